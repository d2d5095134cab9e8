"""Block-sparse attention in Triton: a forward kernel with fused gather and scatter."""

# Triton's language is not Python's: pyright cannot follow constexprs, ranges and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel.kernels.sizes import power_of_two

from . import tuned
from .problem import Problem
from .tiles import Kind, Tile, choose

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PREDICATES = {"box": 1, "disk": 2, "band": 3}
BOX, DISK = tl.constexpr(1), tl.constexpr(2)
LOG2_E = tl.constexpr(math.log2(math.e))


def runs_on(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernel cannot run on this device; an empty list when it can."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return [f"compute capability {capability[0]}.{capability[1]} is below 8.0"]
        return []
    if INTERPRETED.value:
        return []
    return [f"device {device} is not CUDA (set TRITON_INTERPRET=1 before Triton is imported to interpret)"]


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in fp32."""
    if INTERPRETED:  # its matrix product takes bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_rows(base, rows, stride_row, stride_d, row_ok, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows [N, D_PAD] of a strided matrix; zero where `row_ok` is false and behind column D."""
    d = tl.arange(0, D_PAD)
    at = base + rows.to(tl.int64)[:, None] * stride_row + d[None, :] * stride_d
    if MASKED:
        return tl.load(at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    if D < D_PAD:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _admitted(q0, q1, q2, k0, k1, k2, r0, r1, r2, PREDICATE: tl.constexpr):
    """The predicate on every pair of a tile, [TILE_Q, TILE_K]; see `Predicate`."""
    near = tl.abs(q0[:, None] - k0[None, :]) <= r0
    if PREDICATE == BOX:
        near &= (tl.abs(q1[:, None] - k1[None, :]) <= r1) & (tl.abs(q2[:, None] - k2[None, :]) <= r2)
    elif PREDICATE == DISK:
        d1 = q1[:, None] - k1[None, :]
        d2 = q2[:, None] - k2[None, :]
        near &= d1 * d1 + d2 * d2 <= r1 * r1
    return near


@triton.jit
def _online_softmax(logits, v, acc, total, top, unit, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile to the running softmax. `logits` times `unit`, and `top`, are in log2 units."""
    new_top = tl.maximum(top, tl.max(logits, 1) * unit)  # [TILE_Q]
    # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(logits * unit - shift[:, None])  # [TILE_Q, TILE_K]
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    acc = _dot(p.to(v.dtype), v, acc * decay[:, None], PRECISION)
    return acc, total, new_top


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr,
    index_ptr, count_ptr, full_ptr, q_order_ptr, k_order_ptr, bias_ptr, q_coords_ptr, k_coords_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    index_stride_b, index_stride_h, index_stride_q, index_stride_m,
    count_stride_b, count_stride_h, count_stride_q,
    full_stride_b, full_stride_h, full_stride_q,
    q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_s,
    q_len, k_len, heads, heads_per_key_head, q_tiles, list_width,
    radius_0, radius_1, radius_2, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SPLIT: tl.constexpr, PREDICATE: tl.constexpr,
    RAGGED: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head against its list of key blocks, FlashAttention-2 (Dao 2023, 2307.08691).

        p_j = exp2(s_j - m),  m = max_j s_j,  out = sum_j p_j v_j / sum_j p_j,  lse = ln2 (m + log2 sum_j p_j)

    with s = log2(e) (scale q·k + bias), built tile by tile: first the full blocks, without any mask where
    neither bias nor a ragged end asks for one, then the partial ones.
    """
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    HAS_K_ORDER: tl.constexpr = k_order_ptr is not None
    USE_DESC: tl.constexpr = k_desc is not None
    SUB_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SUB_K: tl.constexpr = BLOCK_K // TILE_K

    # neighbouring programs share a head, so that its keys stay in L2
    pid = tl.program_id(0)
    tile = pid % q_tiles
    h = (pid // q_tiles) % heads
    b = (pid // q_tiles) // heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    hk64 = (h // heads_per_key_head).to(tl.int64)
    block = tile // SUB_Q

    # which tokens are our rows
    q_slots = tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    if q_order_ptr is not None:
        q_tok = tl.load(q_order_ptr + b64 * q_order_stride_b + h64 * q_order_stride_h + q_slots)
        q_ok = q_tok >= 0
    else:
        q_tok = q_slots
        q_ok = q_slots < q_len
    q_base = q_ptr + b64 * q_stride_b + h64 * q_stride_h
    q = _load_rows(q_base, q_tok, q_stride_s, q_stride_d, q_ok, True, D, D_PAD)  # [TILE_Q, D_PAD]

    # our list: tiles [0, n_full) are full, [n_full, n_all) partial
    index_ptr += b64 * index_stride_b + h64 * index_stride_h + block.to(tl.int64) * index_stride_q
    n_all = tl.load(count_ptr + b64 * count_stride_b + h64 * count_stride_h + block * count_stride_q)
    n_all = tl.minimum(n_all, list_width) * SUB_K
    if SPLIT:
        if full_ptr is not None:
            n_full = tl.load(full_ptr + b64 * full_stride_b + h64 * full_stride_h + block * full_stride_q)
            n_full = tl.minimum(n_full * SUB_K, n_all)
        else:
            n_full = 0
    else:
        n_full = n_all

    k_base = k_ptr + b64 * k_stride_b + hk64 * k_stride_h
    v_base = v_ptr + b64 * v_stride_b + hk64 * v_stride_h
    if HAS_K_ORDER:
        k_order_ptr += b64 * k_order_stride_b + h64 * k_order_stride_h
    if HAS_BIAS:
        bias_ptr += b64 * bias_stride_b + h64 * bias_stride_h
    in_tile = tl.arange(0, TILE_K)
    # A bias is added after scaling: the compiler would start the product's sum from a bare one, and a large
    # bias would then round every step of that sum. Without a bias the softmax scales, in one fused step.
    unit = 1.0 if HAS_BIAS else to_log2

    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, D_PAD], tl.float32)

    for i in tl.range(0, n_full, num_stages=STAGES):
        first = tl.load(index_ptr + (i // SUB_K) * index_stride_m) * BLOCK_K + (i % SUB_K) * TILE_K
        if USE_DESC:
            k = k_desc.load([b, (h // heads_per_key_head), first, 0]).reshape(TILE_K, D_PAD)
            logits = _dot(q, k.T, None, PRECISION)  # [TILE_Q, TILE_K]
            if RAGGED:
                logits = tl.where((first + in_tile < k_len)[None, :], logits, float("-inf"))
            v = v_desc.load([b, (h // heads_per_key_head), first, 0]).reshape(TILE_K, D_PAD)
        else:
            slots = first + in_tile  # [TILE_K]
            if HAS_K_ORDER and (HAS_BIAS or not PACKED):
                k_tok = tl.load(k_order_ptr + slots)
                k_ok = k_tok >= 0
            else:
                k_tok = slots
                k_ok = slots < k_len
            if HAS_BIAS:
                bias = tl.load(bias_ptr + k_tok * bias_stride_s, mask=k_ok, other=float("-inf")).to(tl.float32)
                k_ok &= bias > float("-inf")
            rows = slots if PACKED else k_tok
            k = _load_rows(k_base, rows, k_stride_s, k_stride_d, k_ok, HAS_BIAS or RAGGED, D, D_PAD)
            logits = _dot(q, k.T, None, PRECISION)
            if HAS_BIAS:
                logits = logits * to_log2 + (bias * LOG2_E)[None, :]
            if HAS_BIAS or RAGGED:
                logits = tl.where(k_ok[None, :], logits, float("-inf"))
            v = _load_rows(v_base, rows, v_stride_s, v_stride_d, k_ok, HAS_BIAS or RAGGED, D, D_PAD)
        acc, total, top = _online_softmax(logits, v, acc, total, top, unit, HAS_BIAS or RAGGED, PRECISION)

    if SPLIT:
        if PREDICATE > 0:
            q_at = q_coords_ptr + q_tok
            q0 = tl.load(q_at, mask=q_ok, other=0)  # [TILE_Q]
            q1 = tl.load(q_at + q_len, mask=q_ok, other=0)
            q2 = tl.load(q_at + 2 * q_len, mask=q_ok, other=0)
        for i in tl.range(n_full, n_all, num_stages=STAGES):
            first = tl.load(index_ptr + (i // SUB_K) * index_stride_m) * BLOCK_K + (i % SUB_K) * TILE_K
            slots = first + in_tile  # [TILE_K]
            if HAS_K_ORDER:
                k_tok = tl.load(k_order_ptr + slots)
                k_ok = k_tok >= 0
            else:
                k_tok = slots
                k_ok = slots < k_len
            if HAS_BIAS:
                bias = tl.load(bias_ptr + k_tok * bias_stride_s, mask=k_ok, other=float("-inf")).to(tl.float32)
                k_ok &= bias > float("-inf")
            rows = slots if PACKED else k_tok
            k = _load_rows(k_base, rows, k_stride_s, k_stride_d, k_ok, True, D, D_PAD)
            logits = _dot(q, k.T, None, PRECISION)
            if HAS_BIAS:
                logits = logits * to_log2 + (bias * LOG2_E)[None, :]
            visible = q_ok[:, None] & k_ok[None, :]
            if PREDICATE > 0:
                k_at = k_coords_ptr + k_tok
                k0 = tl.load(k_at, mask=k_ok, other=0)  # [TILE_K]
                k1 = tl.load(k_at + k_len, mask=k_ok, other=0)
                k2 = tl.load(k_at + 2 * k_len, mask=k_ok, other=0)
                visible &= _admitted(q0, q1, q2, k0, k1, k2, radius_0, radius_1, radius_2, PREDICATE)
            logits = tl.where(visible, logits, float("-inf"))
            # a weight of zero does not silence a NaN, so values that no row sees are not even loaded
            seen = tl.max(visible.to(tl.int32), 0) > 0
            v = _load_rows(v_base, rows, v_stride_s, v_stride_d, seen, True, D, D_PAD)
            acc, total, top = _online_softmax(logits, v, acc, total, top, unit, True, PRECISION)

    # a row without a key has total = 0, top = -inf: out 0, lse -inf
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453
    d = tl.arange(0, D_PAD)
    out_at = out_ptr + ((b64 * q_len + q_tok) * heads + h)[:, None] * D + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=q_ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + (b64 * heads + h) * q_len + q_tok, lse, mask=q_ok)


@triton.jit
def _pack_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, order_ptr, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, order_stride_b, order_stride_h,
    slots, heads, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copy the rows of two tensors [B, S, H, D] into slot order [B, H, slots, D]; a hole becomes zeros."""
    h = (tl.program_id(1) % heads).to(tl.int64)
    b = (tl.program_id(1) // heads).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tok = tl.load(order_ptr + b * order_stride_b + h * order_stride_h + slot, mask=slot < slots, other=-1)
    k = _load_rows(k_ptr + b * k_stride_b + h * k_stride_h, tok, k_stride_s, k_stride_d, tok >= 0, True, D, D_PAD)
    v = _load_rows(v_ptr + b * v_stride_b + h * v_stride_h, tok, v_stride_s, v_stride_d, tok >= 0, True, D, D_PAD)
    d = tl.arange(0, D_PAD)
    at = ((b * heads + h) * slots + slot)[:, None] * D + d[None, :]
    mask = (slot < slots)[:, None] & (d < D)[None, :]
    tl.store(k_out_ptr + at, k, mask=mask)
    tl.store(v_out_ptr + at, v, mask=mask)


def attend(problem: Problem, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernel on a checked, non-empty call; `tile` overrides the table (for tests and benchmarks)."""
    tile = tile or _tile_for(problem)
    out, lse = _outputs(problem)
    with torch.cuda.device_of(problem.q):
        grid, args, constants = launch(problem, tile, out, lse)
        _attention_kernel[grid](*args, **constants)
    return out, lse


def launch(problem: Problem, tile: Tile, out: Tensor, lse: Tensor) -> tuple[tuple[int], tuple, dict]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    q, k, v, predicate = problem.q, problem.k, problem.v, problem.predicate
    batch, q_len, heads, dim = q.shape
    q_order = None if problem.q_order is None else problem.q_order.contiguous()
    k_order = None if problem.k_order is None else problem.k_order.contiguous()
    packed = tile.pack and problem.pack and k_order is not None and _can_pack(problem)
    if packed:
        k, v = _pack(k, v, k_order)
    k_desc, v_desc = None, None
    if tile.tma and problem.key_bias is None and (packed or k_order is None) and _fit_tma(k, v):
        k_desc, v_desc = _descriptor(k, tile.k), _descriptor(v, tile.k)
    q_tiles = problem.index.shape[2] * problem.block_q // tile.q
    args = (
        q, k, v, k_desc, v_desc, out, lse,
        problem.index, problem.count, problem.full_count, q_order, k_order, problem.key_bias,
        None if predicate is None else predicate.q_coords.contiguous(),
        None if predicate is None else predicate.k_coords.contiguous(),
        *q.stride(), *k.stride(), *v.stride(),
        *_list_strides(problem.index), *_list_strides(problem.count), *_list_strides(problem.full_count, 3),
        *_list_strides(q_order, 3)[:2], *_list_strides(k_order, 3)[:2], *_list_strides(problem.key_bias, 3),
        q_len, problem.k.shape[1], heads, heads // k.shape[2], q_tiles, problem.index.shape[3],
        *(predicate.radius if predicate else (0, 0, 0)), problem.scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": power_of_two(dim),
        "BLOCK_Q": problem.block_q,
        "BLOCK_K": problem.block_k,
        "TILE_Q": tile.q,
        "TILE_K": tile.k,
        "SPLIT": problem.splits,
        "PREDICATE": PREDICATES[predicate.kind] if predicate else 0,
        "RAGGED": problem.k_order is None and problem.k.shape[1] % problem.block_k > 0,
        "PACKED": packed,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (q_tiles * heads * batch,), args, constants


def _fit_tma(*tensors: Tensor) -> bool:
    """Whether the copy engine can read [B, S, H, D]: unit last stride, all else aligned to 16 bytes."""
    return all(
        tensor.stride(3) == 1
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in _outer_strides(tensor))
        for tensor in tensors
    )


def _outer_strides(tensor: Tensor) -> list[int]:
    """Strides of B, S, H; an axis of length one is never walked, so it gets one that looks aligned."""
    return [s if n > 1 else 16 for s, n in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)]


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Read [B, S, H, D] as [B, H, S, D] in tiles of one head; what lies outside reads as zero."""
    batch, length, heads, dim = tensor.shape
    stride_b, stride_s, stride_h = _outer_strides(tensor)
    shape, strides = [batch, heads, length, dim], [stride_b, stride_h, stride_s, 1]
    return TensorDescriptor(tensor, shape, strides, [1, 1, rows, power_of_two(dim)])


def _tile_for(problem: Problem) -> Tile:
    q, kind, blocks = problem.q, kind_of(problem), (problem.block_q, problem.block_k)
    padded = power_of_two(q.shape[3])
    own = tuned.tile_for(q.device, "as given", kind, padded, *blocks) if q.element_size() == 2 else None
    return own or choose(_capability(q.device), padded, q.element_size(), *blocks, kind)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def kind_of(problem: Problem) -> Kind:
    """What costs most in a call."""
    if problem.key_bias is not None:
        return "bias"
    if not problem.splits:
        return "plain"
    return "holes" if problem.predicate is None else "predicate"


def _can_pack(problem: Problem) -> bool:
    """An order per query head cannot be packed where query heads share key heads."""
    order = problem.k_order
    return order is not None and (order.shape[1] == 1 or problem.q.shape[2] == problem.k.shape[2])


def _pack(k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in slot order, [B, slots, H, D] views of head-major memory."""
    batch, _, heads, dim = k.shape
    slots, rows = order.shape[2], 32
    packed_k, packed_v = (torch.empty(batch, heads, slots, dim, dtype=k.dtype, device=k.device) for _ in range(2))
    _pack_kernel[(-(-slots // rows), batch * heads)](
        k, v, packed_k, packed_v, order, *k.stride(), *v.stride(), *_list_strides(order)[:2], slots, heads,
        D=dim, D_PAD=power_of_two(dim), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return packed_k.transpose(1, 2), packed_v.transpose(1, 2)


def _outputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """Room for the results; already filled where an order may leave queries out."""
    q = problem.q
    batch, q_len, heads, _ = q.shape
    if problem.q_order is None or problem.every_query:
        return (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device),
        )
    return (
        torch.zeros(q.shape, dtype=q.dtype, device=q.device),
        torch.full((batch, heads, q_len), -math.inf, dtype=torch.float32, device=q.device),
    )


def _list_strides(tensor: Tensor | None, rank: int = 0) -> tuple[int, ...]:
    """Strides with 0 where batch or heads are broadcast."""
    if tensor is None:
        return (0,) * rank
    own = tensor.stride()
    return (own[0] if tensor.shape[0] > 1 else 0, own[1] if tensor.shape[1] > 1 else 0, *own[2:])
