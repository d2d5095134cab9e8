"""Block-sparse attention on int8 queries and keys in Triton; `quantised.py` defines what it computes."""

# Triton's language is not Python's: pyright cannot follow constexprs, ranges and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .problem import Problem
from .quantised_pack import SMALLEST, TOP, Packed, pack, padded, to_int8
from .tiles import Kind, Tile, power_of_two_part
from .triton import (
    LOG2_E,
    PREDICATES,
    _admitted,
    _descriptor,
    _dot,
    _fit_tma,
    _list_strides,
    _load_rows,
    _outputs,
    kind_of,
)


@triton.jit
def _online_softmax(dots, unit, visible, bias, v, acc, total, top, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Add one tile to the running softmax; `dots` times `unit` [TILE_Q], and `bias`, are in log2 units.

    What is not `visible` is set to -inf after scaling, so that a NaN step reaches only those who see its block.
    """
    if MASKED:
        logits = dots * unit[:, None]
        if HAS_BIAS:
            logits += bias[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))  # [TILE_Q]
        # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - shift[:, None])  # [TILE_Q, TILE_K]
    else:
        new_top = tl.maximum(top, tl.max(dots, 1) * unit)
        shift = new_top
        p = tl.exp2(dots * unit[:, None] - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(p, 1)
    acc = _dot(p.to(v.dtype), v, acc * decay[:, None], "tf32")
    return acc, total, new_top


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, step_ptr, mean_ptr, out_ptr, lse_ptr,
    index_ptr, count_ptr, full_ptr, q_order_ptr, k_order_ptr, bias_ptr, q_coords_ptr, k_coords_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    index_stride_b, index_stride_h, index_stride_q, index_stride_m,
    count_stride_b, count_stride_h, count_stride_q, full_stride_b, full_stride_h, full_stride_q,
    q_order_stride_b, q_order_stride_h, k_order_stride_b, k_order_stride_h,
    bias_stride_b, bias_stride_h, bias_stride_s,
    q_len, k_len, k_blocks, v_rows, heads, heads_per_packed, heads_per_value_head, heads_per_mean, q_tiles, list_width,
    radius_0, radius_1, radius_2, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SPLIT: tl.constexpr, PREDICATE: tl.constexpr,
    RAGGED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query tile of one head against its list of key blocks, as the bf16 kernel walks it.

    The tile rounds its own queries, q ≈ a q8; keys come packed, k - m ≈ b k8. A logit in log2 units is then
    log2(e) scale a b (q8·k8) + bias, one factor a row and tile, and the log-sum-exp gets scale q·m back.
    """
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    HAS_K_ORDER: tl.constexpr = k_order_ptr is not None
    SUB_Q: tl.constexpr = BLOCK_Q // TILE_Q
    SUB_K: tl.constexpr = BLOCK_K // TILE_K

    # neighbouring programs share a head, so that its keys stay in L2
    pid = tl.program_id(0)
    tile = pid % q_tiles
    h = (pid // q_tiles) % heads
    b = (pid // q_tiles) // heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    block = tile // SUB_Q
    d = tl.arange(0, D_PAD)

    # our rows, rounded
    q_slots = tile * TILE_Q + tl.arange(0, TILE_Q)  # [TILE_Q]
    if q_order_ptr is not None:
        q_tok = tl.load(q_order_ptr + b64 * q_order_stride_b + h64 * q_order_stride_h + q_slots)
        q_ok = q_tok >= 0
    else:
        q_tok = q_slots
        q_ok = q_slots < q_len
    q_base = q_ptr + b64 * q_stride_b + h64 * q_stride_h
    q = _load_rows(q_base, q_tok, q_stride_s, q_stride_d, q_ok, True, D, D_PAD).to(tl.float32)  # [TILE_Q, D_PAD]
    mean_at = (b64 * (heads // heads_per_mean) + h64 // heads_per_mean) * D
    mean = tl.load(mean_ptr + mean_at + d, mask=d < D, other=0.0)
    lost = tl.sum(q * mean[None, :], 1) * scale
    finite = tl.abs(q) < float("inf")
    largest = tl.max(tl.where(finite, tl.abs(q), 0.0), 1)
    q_step = tl.maximum(tl.div_rn(largest, TOP), SMALLEST)
    q8 = to_int8(q, finite, q_step[:, None])
    broken = tl.max(tl.where(finite, 0, 1), 1) > 0
    q_unit = tl.where(broken, float("nan"), q_step) * (scale * LOG2_E)

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

    packed = b64 * (heads // heads_per_packed) + h64 // heads_per_packed
    step_ptr += packed * k_blocks
    k_base = k_ptr + packed * k_blocks * BLOCK_K * D_PAD
    v_base = v_ptr + b64 * v_stride_b + (h64 // heads_per_value_head) * v_stride_h
    if HAS_K_ORDER:
        k_order_ptr += b64 * k_order_stride_b + h64 * k_order_stride_h
    if HAS_BIAS:
        bias_ptr += b64 * bias_stride_b + h64 * bias_stride_h
    in_tile = tl.arange(0, TILE_K)

    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, D_PAD], tl.float32)

    for i in tl.range(0, n_full, num_stages=STAGES):
        key_block = tl.load(index_ptr + (i // SUB_K) * index_stride_m)
        first = key_block * BLOCK_K + (i % SUB_K) * TILE_K
        slots = first + in_tile  # [TILE_K]
        unit = q_unit * tl.load(step_ptr + key_block)
        if k_desc is not None:
            k = k_desc.load([b, h // heads_per_packed, first, 0]).reshape(TILE_K, D_PAD)
        else:
            k = tl.load(k_base + slots.to(tl.int64)[:, None] * D_PAD + d[None, :])
        dots = tl.dot(q8, k.T, out_dtype=tl.int32).to(tl.float32)  # [TILE_Q, TILE_K], exact
        k_ok = slots < k_len
        bias = in_tile  # not read without a bias
        if HAS_BIAS:
            k_tok = slots
            if HAS_K_ORDER:
                k_tok = tl.load(k_order_ptr + slots)
                k_ok = k_tok >= 0
            bias = tl.load(bias_ptr + k_tok * bias_stride_s, mask=k_ok, other=float("-inf")).to(tl.float32) * LOG2_E
            k_ok &= bias > float("-inf")
        if v_desc is not None:
            v = v_desc.load([b, h // heads_per_value_head, first, 0]).reshape(TILE_K, D_PAD)
        else:
            v = _load_rows(v_base, slots, v_stride_s, v_stride_d, slots < v_rows, RAGGED, D, D_PAD)
        acc, total, top = _online_softmax(
            dots, unit, k_ok[None, :], bias, v, acc, total, top, HAS_BIAS or RAGGED, HAS_BIAS
        )

    if SPLIT:
        if PREDICATE > 0:
            q_at = q_coords_ptr + q_tok
            q0 = tl.load(q_at, mask=q_ok, other=0)  # [TILE_Q]
            q1 = tl.load(q_at + q_len, mask=q_ok, other=0)
            q2 = tl.load(q_at + 2 * q_len, mask=q_ok, other=0)
        for i in tl.range(n_full, n_all, num_stages=STAGES):
            key_block = tl.load(index_ptr + (i // SUB_K) * index_stride_m)
            slots = key_block * BLOCK_K + (i % SUB_K) * TILE_K + in_tile  # [TILE_K]
            unit = q_unit * tl.load(step_ptr + key_block)
            k = tl.load(k_base + slots.to(tl.int64)[:, None] * D_PAD + d[None, :])
            dots = tl.dot(q8, k.T, out_dtype=tl.int32).to(tl.float32)
            if HAS_K_ORDER:
                k_tok = tl.load(k_order_ptr + slots)
                k_ok = k_tok >= 0
            else:
                k_tok = slots
                k_ok = slots < k_len
            bias = in_tile
            if HAS_BIAS:
                bias = tl.load(bias_ptr + k_tok * bias_stride_s, mask=k_ok, other=float("-inf")).to(tl.float32) * LOG2_E
                k_ok &= bias > float("-inf")
            visible = q_ok[:, None] & k_ok[None, :]
            if PREDICATE > 0:
                k_at = k_coords_ptr + k_tok
                k0 = tl.load(k_at, mask=k_ok, other=0)  # [TILE_K]
                k1 = tl.load(k_at + k_len, mask=k_ok, other=0)
                k2 = tl.load(k_at + 2 * k_len, mask=k_ok, other=0)
                visible &= _admitted(q0, q1, q2, k0, k1, k2, radius_0, radius_1, radius_2, PREDICATE)
            # a weight of zero does not silence a NaN, so values that no row sees are not even loaded
            seen = tl.max(visible.to(tl.int32), 0) > 0
            v = _load_rows(v_base, slots, v_stride_s, v_stride_d, seen, True, D, D_PAD)
            acc, total, top = _online_softmax(dots, unit, visible, bias, v, acc, total, top, True, HAS_BIAS)

    # a row without a key has total = 0, top = -inf: out 0, lse -inf
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453 + lost)
    out_at = out_ptr + ((b64 * q_len + q_tok) * heads + h)[:, None] * D + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=q_ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + (b64 * heads + h) * q_len + q_tok, lse, mask=q_ok)


def attend(problem: Problem, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernels on a checked, non-empty call in fp16 or bf16; `tile` overrides the choice (for benchmarks)."""
    tile = tile or _tile_for(problem)
    out, lse = _outputs(problem)
    with torch.cuda.device_of(problem.q):
        packed = pack(problem)
        grid, args, constants = launch(problem, packed, tile, out, lse)
        _attention_kernel[grid](*args, **constants)
    return out, lse


def choose(capability: tuple[int, int], padded_dim: int, block_q: int, block_k: int, kind: Kind) -> Tile:
    """The tile for one launch: as large as it compiles with few spills (see docs/portability.md), not yet timed."""
    q, k = power_of_two_part(block_q), power_of_two_part(block_k)
    if padded_dim == 256:
        return Tile(min(q, 64), min(k, 32), 4, 2)
    if capability in ((9, 0), (10, 0)):
        return Tile(q, min(k, 64), 4 if kind == "plain" or q < 128 else 8, 3, tma=True)
    if capability == (8, 0):
        return Tile(q, min(k, 64), 4 if q < 128 else 8, 2)
    return Tile(min(q, 64), min(k, 64), 4, 2)


def _tile_for(problem: Problem) -> Tile:
    device = problem.q.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    kind, blocks = kind_of(problem), (problem.block_q, problem.block_k)
    own = tuned.tile_for(device, "int8", kind, padded(problem), *blocks)
    return own or choose(capability, padded(problem), *blocks, kind)


def launch(problem: Problem, packed: Packed, tile: Tile, out: Tensor, lse: Tensor) -> tuple[tuple[int], tuple, dict]:
    """Grid, positional arguments and compile-time constants of the attention kernel for one call."""
    q, v, predicate = problem.q, packed.v, problem.predicate
    batch, q_len, heads, dim = q.shape
    k_desc, v_desc = None, None
    if tile.tma and problem.key_bias is None and _fit_tma(v) and triton.next_power_of_2(v.shape[3]) == padded(problem):
        k_desc, v_desc = _descriptor(packed.k, tile.k), _descriptor(v, tile.k)
    q_order = None if problem.q_order is None else problem.q_order.contiguous()
    k_order = None if problem.k_order is None else problem.k_order.contiguous()
    q_tiles = problem.index.shape[2] * problem.block_q // tile.q
    args = (
        q, packed.k, v, k_desc, v_desc, packed.step, packed.mean, out, lse,
        problem.index, problem.count, problem.full_count, q_order, k_order, problem.key_bias,
        None if predicate is None else predicate.q_coords.contiguous(),
        None if predicate is None else predicate.k_coords.contiguous(),
        *q.stride(), *v.stride(),
        *_list_strides(problem.index), *_list_strides(problem.count), *_list_strides(problem.full_count, 3),
        *_list_strides(q_order, 3)[:2], *_list_strides(k_order, 3)[:2], *_list_strides(problem.key_bias, 3),
        q_len, problem.k.shape[1], packed.step.shape[2], v.shape[1], heads, heads // packed.step.shape[1],
        heads // v.shape[2], heads // problem.k.shape[2], q_tiles, problem.index.shape[3],
        *(predicate.radius if predicate else (0, 0, 0)), problem.scale,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": padded(problem),
        "BLOCK_Q": problem.block_q,
        "BLOCK_K": problem.block_k,
        "TILE_Q": tile.q,
        "TILE_K": tile.k,
        "SPLIT": problem.splits,
        "PREDICATE": PREDICATES[predicate.kind] if predicate else 0,
        "RAGGED": problem.k_order is None and problem.k.shape[1] % problem.block_k > 0,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (q_tiles * heads * batch,), args, constants
