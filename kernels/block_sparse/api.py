"""The door of the operation: checks, choice of the back end, empty cases."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_accel.kernels.choice import wants_triton, why_not_triton

from .op import traced
from .problem import Precision, Predicate, Problem

Backend = Literal["triton", "cpu", "flex", "fa4", "reference"]
__all__ = ["Backend", "Precision", "Predicate", "block_sparse_attention", "unsupported_reasons"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    block_q: int,
    block_k: int,
    full_count: Tensor | None = None,
    q_order: Tensor | None = None,
    k_order: Tensor | None = None,
    key_bias: Tensor | None = None,
    predicate: Predicate | None = None,
    scale: float | None = None,
    every_query: bool = False,
    pack: bool = True,
    precision: Precision = "as given",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention of each query block over its own list of key blocks.

    A *slot* is a position in the order in which tokens are cut into blocks. Slot s of the keys holds token
    `k_order[s]`, or token s without an order; -1 is a hole that holds no token. Query block i attends the
    key blocks `index[..., i, :count[..., i]]`, of which the first `full_count[..., i]` are *full*: each of
    their slots holds a token and the predicate is not asked. A ragged last block needs no care: the slots
    behind the last token hold none.

    Args:
        q: [B, Sq, H, D]; k, v: [B, Sk, Hk, D] with Hk dividing H; fp16, bf16 or fp32 (the reference takes
            fp64 too), any strides, D from 16 to 256.
        index: int32 [B|1, H|1, Nq, M], key-block ids; the used ones lie in [0, Nk) and do not repeat within
            a row (neither is checked here: it would stall the device).
        count: int32 [B|1, H|1, Nq], how many leading entries of `index` are used.
        block_q, block_k: slots per query and key block, multiples of 16 from 16 to 128.
        full_count: int32 [B|1, H|1, Nq]; None says that every block is partial, and `count` itself (the
            same tensor) that every block is full, which spares the kernel its second loop.
        q_order, k_order: int32 [B|1, H|1, Nq * block_q] and [B|1, H|1, Nk * block_k], slot -> token or -1;
            None is the identity. No token may occur twice.
        key_bias: floating [B|1, H|1, Sk], added to the logits (natural-log units) in every block; may be
            -inf, which masks the key. Indexed by original token.
        predicate: which pairs of the partial blocks may attend.
        scale: factor of the logits, positive; None is D ** -0.5.
        every_query: says that each query lies in a slot of `q_order` (not checked), so that nothing needs to be
            filled in for those that lie in none.
        pack: whether keys and values may be copied into slot order first, which gains where each is read more than a
            few times.
        precision: "int8" rounds queries and keys to int8, the keys of a block on one grid (see `quantised.py`); on
            CUDA for fp16 and bf16, elsewhere computed on the rounded numbers.
        backend: None takes the first that can run: "cpu" on a CPU; Triton on CUDA; "flex", which is torch's
            FlexAttention, on what Triton's kernels do not run on; else the reference. A name is obeyed; "fa4" is
            flash-attn-4, where it is installed, for whole blocks of 128 x 128.

    Returns:
        out [B, Sq, H, D] in q's dtype, contiguous, and lse [B, H, Sq] in float32: the natural logarithm of
        the sum of exp(logits). A query without an admissible key, or in no slot, has out 0 and lse -inf.
        A key that no query of a block may see has no influence on that block, whatever it holds (NaN too).

    Raises:
        ValueError: shapes, values or devices that do not fit; what was given is in the message.
        TypeError: wrong dtypes.
        RuntimeError: the named back end cannot run this, with all reasons; or a gradient is needed.

    The arithmetic is FlashAttention-2's (Dao 2023, arXiv 2307.08691) over a block list.
    """
    order = (full_count, q_order, k_order, key_bias, predicate, scale, every_query, pack, precision)
    lists = (q, k, v, index, count, block_q, block_k, *order)
    if torch.compiler.is_compiling():
        return traced(*lists, backend)
    problem = _checked(*lists)
    chosen = _chosen_backend(problem, backend)
    if problem.is_empty:
        return _nothing_attended(q)
    return _attended(problem, chosen)


def _attended(problem: Problem, backend: Backend) -> tuple[Tensor, Tensor]:
    if backend == "triton" and _for_hopper(problem):
        from .hopper import attend
    elif backend == "triton" and problem.precision == "int8":
        from .quantised_triton import attend
    elif backend == "triton":
        from .triton import attend
    elif backend == "cpu":
        from .cpu import attend
    elif backend == "flex":
        from .flex import attend
    elif backend == "fa4":
        from .fa4 import attend
    else:
        from .reference import attend
    if backend != "triton" and problem.precision == "int8":
        from .quantised import on_rounded

        return on_rounded(problem, attend)
    return attend(problem)


def _for_hopper(problem: Problem) -> bool:
    """Whether the kernel in Gluon, which Triton carries as an experiment, takes a call."""
    if not problem.q.is_cuda or torch.version.hip:
        return False
    try:
        from .hopper import takes
    except (ImportError, AttributeError):  # another Triton's Gluon
        return False
    return takes(problem)


def unsupported_reasons(
    backend: Backend,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    precision: Precision = "as given",
) -> list[str]:
    """Why a back end cannot take such tensors; an empty list when it can."""
    if backend == "reference":
        return _reference_reasons(dtype)
    if backend == "cpu":
        return _cpu_reasons(device, dtype)
    if backend == "triton":
        return why_not_triton(_triton_reasons, device, dtype, head_dim, precision)
    if backend == "flex":
        from .flex import runs_on

        return runs_on(device, dtype)
    if backend == "fa4":
        from .fa4 import runs_on

        return runs_on(device, dtype, head_dim)
    raise ValueError(f"backend is {backend!r}; known are {str(get_args(Backend))[1:-1]} and None (automatic)")


def _reference_reasons(dtype: torch.dtype) -> list[str]:
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return [] if dtype in known else [f"dtype {dtype} is not a floating type that the reference takes"]


def _cpu_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = _reference_reasons(dtype)
    if device.type != "cpu":
        reasons.append(f"the tensors lie on {device.type}")
    return reasons


def _triton_reasons(device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision) -> list[str]:
    from . import triton

    reasons = triton.runs_on(device, dtype)
    if precision == "int8" and dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {dtype} is not fp16 or bf16, which precision 'int8' takes")
    elif dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {dtype} is not fp16, bf16 or fp32")
    if not 16 <= head_dim <= 256:
        reasons.append(f"head dim {head_dim} is not within 16..256")
    return reasons


def _chosen_backend(problem: Problem, backend: Backend | None) -> Backend:
    q, precision = problem.q, problem.precision
    tried: dict[Backend, list[str]] = {}
    for name in (backend,) if backend is not None else _in_turn(q, precision):
        reasons = unsupported_reasons(name, device=q.device, dtype=q.dtype, head_dim=q.shape[3], precision=precision)
        if name == "fa4":
            from .fa4 import misfits

            reasons += misfits(problem)
        if not reasons:
            return name
        tried[name] = reasons
    what = f"precision {precision!r}" if backend is None else f"backend {backend!r}"
    why = "; ".join(reason for reasons in tried.values() for reason in reasons)
    raise RuntimeError(f"{what} cannot run q {_shown(q)} on {q.device}: {why}")


def _in_turn(q: Tensor, precision: Precision) -> tuple[Backend, ...]:
    """What is automatic on q's device, with Triton first or left out where that is preferred for now."""
    names = automatic(q.device, precision)
    if wants_triton(q):
        return names if "triton" in names else ("triton", *names)
    return tuple(name for name in names if name != "triton") or names


def automatic(device: torch.device, precision: Precision = "as given") -> tuple[Backend, ...]:
    """The back ends to try in turn where none is named; lower precision is for speed, so only its kernel will do."""
    if device.type == "cpu":
        return ("cpu", "reference")
    if precision != "as given":
        return ("triton",)
    ours = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ("triton", "reference") if ours else ("triton", "flex", "reference")


def _nothing_attended(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.full((batch, heads, length), -math.inf, dtype=torch.float32, device=q.device)


# --- checks: shapes, dtypes and devices only, nothing that would wait for the device ---


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    full_count: Tensor | None,
    q_order: Tensor | None,
    k_order: Tensor | None,
    key_bias: Tensor | None,
    predicate: Predicate | None,
    scale: float | None,
    every_query: bool = False,
    pack: bool = True,
    precision: Precision = "as given",
) -> Problem:
    _check_qkv(q, k, v)
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; known are {str(get_args(Precision))[1:-1]}")
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if not (16 <= block <= 128 and block % 16 == 0):
            raise ValueError(f"{name} is {block}; expected a multiple of 16 from 16 to 128")
    batch, q_len, heads, head_dim = q.shape
    if index.dim() != 4:
        raise ValueError(f"index is {_shown(index)}; expected [B|1, H|1, Nq, M]")
    q_blocks = index.shape[2]
    k_slots = k_order.shape[-1] if k_order is not None else -(-k.shape[1] // block_k) * block_k
    if k_slots % block_k:
        raise ValueError(f"k_order is {_shown(k_order)}; expected a multiple of block_k={block_k} slots")
    if q_order is None and q_blocks != -(-q_len // block_q):
        raise ValueError(
            f"index is {_shown(index)} for q {_shown(q)}; expected Nq={-(-q_len // block_q)} blocks of {block_q}"
        )
    for name, tensor, last in (
        ("index", index, (q_blocks, index.shape[3])),
        ("count", count, (q_blocks,)),
        ("full_count", full_count, (q_blocks,)),
        ("q_order", q_order, (q_blocks * block_q,)),
        ("k_order", k_order, (k_slots,)),
        ("key_bias", key_bias, (k.shape[1],)),
    ):
        if tensor is not None:
            _check_list(name, tensor, batch, heads, last, q.device)
    _check_predicate(predicate, q, k)
    factor = head_dim**-0.5 if scale is None else float(scale)
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"scale is {scale}; expected a positive finite number")
    order = (full_count, q_order, k_order, key_bias, predicate, factor, every_query, pack, precision)
    return Problem(q, k, v, index, count, block_q, block_k, *order)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    shown = f"q {_shown(q)}, k {_shown(k)}, v {_shown(v)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"{shown}; expected [B, S, H, D] each")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{shown}; expected k and v alike, and q's batch and head dim")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shown}; expected the key heads to divide the query heads")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise TypeError(f"{shown}; expected one floating dtype")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v lie on {q.device}, {k.device}, {v.device}; expected one device")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            f"{shown}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )


def _check_list(name: str, tensor: Tensor, batch: int, heads: int, last: tuple[int, ...], device: torch.device) -> None:
    fits = (
        tensor.dim() == 2 + len(last)
        and tensor.shape[0] in (1, batch)
        and tensor.shape[1] in (1, heads)
        and tuple(tensor.shape[2:]) == last
    )
    if not fits:
        raise ValueError(f"{name} is {_shown(tensor)}; expected [{batch}|1, {heads}|1, {str(list(last))[1:-1]}]")
    if name == "key_bias":
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"key_bias is {tensor.dtype}; expected a floating dtype")
    elif tensor.dtype != torch.int32:
        raise TypeError(f"{name} is {tensor.dtype}; expected torch.int32")
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, q on {device}")


def _check_predicate(predicate: Predicate | None, q: Tensor, k: Tensor) -> None:
    if predicate is None:
        return
    if predicate.kind not in ("box", "disk", "band"):
        raise ValueError(f"predicate kind is {predicate.kind!r}; known are 'box', 'disk', 'band'")
    if len(predicate.radius) != 3:
        raise ValueError(f"predicate radius is {predicate.radius}; expected one number per axis, three")
    for name, coords, length in (
        ("q_coords", predicate.q_coords, q.shape[1]),
        ("k_coords", predicate.k_coords, k.shape[1]),
    ):
        if tuple(coords.shape) != (3, length):
            raise ValueError(f"predicate {name} is {_shown(coords)}; expected [3, {length}]")
        if coords.dtype != torch.int32:
            raise TypeError(f"predicate {name} is {coords.dtype}; expected torch.int32")
        if coords.device != q.device:
            raise ValueError(f"predicate {name} lies on {coords.device}, q on {q.device}")


def _shown(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
