"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, head_reasons, takes_triton

from .op import error_op


def unit_error(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    bounds: Tensor,
    block: int,
    means_v: Tensor,
    scale: float,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return how far sum_j exp(q k_j) v_j over a unit is from n exp(q k̄) v̄, over the sum of exp(q k) of all units.

    Args:
        queries: float32 [B, H, R, D]; Triton multiplies them rounded to the dtype of k.
        k, v: floating [B, S, H, D] of one dtype, any strides.
        slots: int32 [B|1, H|1, slots], the token in each slot, -1 a hole.
        bounds: int64 [B|1, H|1, units + 1], the first slot of each unit and the end, multiples of `block`. Slots
            behind the last belong to no unit.
        block: slots that units are whole numbers of, a multiple of 16.
        means_v: float32 [B, H, units, D], the mean v̄ of each unit's n tokens. Their k̄ is not asked for: q k̄ is the mean
            of q k_j.
        scale: what products of queries and keys are multiplied by, above 0.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        float32 [B, H, R, units], Euclidean lengths; 0 for a unit without tokens. What is not finite in a head makes the
        head's lengths of the queries concerned not finite; a value, those of its unit, and in Triton one of token 0
        those of every unit with holes.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this.

    The error that SVG-EAR (arXiv 2603.08982) spends its budget by.
    """
    if torch.compiler.is_compiling():
        return error_op(queries, k, v, slots, bounds, block, means_v, scale, backend)
    _check(queries, k, v, slots, bounds, block, means_v)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected a number above 0")
    if takes_triton(backend, "attend k {}", _triton_reasons, k) and queries.numel() > 0 and bounds.shape[2] > 1:
        from .triton import lengths
    else:
        from .reference import lengths
    return lengths(queries, k, v, slots, bounds, block, means_v, scale)


def _triton_reasons(k: Tensor) -> list[str]:
    from . import triton

    return triton.runs_on(k.device, k.dtype) + head_reasons(k)


def _check(queries: Tensor, k: Tensor, v: Tensor, slots: Tensor, bounds: Tensor, block: int, means_v: Tensor) -> None:
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.dtype.is_floating_point:
        raise ValueError(f"k is {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}; expected both [B, S, H, D]")
    b, _, h, d = k.shape
    shape = tuple(queries.shape[:2]), *queries.shape[3:]
    if queries.dim() != 4 or shape != ((b, h), d) or queries.dtype != torch.float32:
        raise ValueError(f"queries is {list(queries.shape)} {queries.dtype}; expected float32 [{b}, {h}, R, {d}]")
    for name, x, dtype in (("slots", slots, torch.int32), ("bounds", bounds, torch.int64)):
        if x.dim() != 3 or x.shape[0] not in (1, b) or x.shape[1] not in (1, h) or x.dtype != dtype:
            raise ValueError(f"{name} is {list(x.shape)} {x.dtype}; expected {dtype} [{b}|1, {h}|1, ...]")
    if block < 16 or block % 16 or slots.shape[2] % block:
        raise ValueError(f"block is {block}; expected a multiple of 16 that divides {slots.shape[2]} slots")
    units = bounds.shape[2] - 1
    if tuple(means_v.shape) != (b, h, units, d) or means_v.dtype != torch.float32:
        raise ValueError(f"means_v is {list(means_v.shape)} {means_v.dtype}; expected float32 {[b, h, units, d]}")
