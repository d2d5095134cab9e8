"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, head_reasons, takes_triton

from .op import descend_op


def descend(queries: Tensor, k: Tensor, slots: Tensor, unit: int, *, backend: Backend | None = None) -> Tensor:
    """Return the best product that each group of queries meets on a binary descent through each unit of keys.

    A unit's real keys, which come first in it, are halved: the middle key of the left half is held against that of the
    right half, each by its largest product with any query of the group; the search goes on in the half of the larger
    one (the right, of equal ones) until nothing is left to halve.

    Args:
        queries: floating [B, H, groups, asking, D].
        k: [B, S, H, D] of the same dtype, any strides.
        slots: int32 [units * unit], the key in each slot, -1 a hole, holes behind the keys of a unit.
        unit: slots of a unit, a multiple of 16.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        float32 [B, H, groups, units], unscaled. What is not finite among the keys met makes the result not finite.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this.

    The search of HiP (Lee et al. 2024, arXiv 2406.09827) and InfiniteHiP (2025, arXiv 2502.08910), one unit at a time.
    """
    if torch.compiler.is_compiling():
        return descend_op(queries, k, slots, unit, backend)
    _check(queries, k, slots, unit)
    if takes_triton(backend, "search {}", _triton_reasons, queries) and min(queries.numel(), len(slots)) > 0:
        from .triton import best
    else:
        from .reference import best
    return best(queries, k, slots, unit)


def _triton_reasons(queries: Tensor) -> list[str]:
    from . import triton

    reasons = triton.runs_on(queries.device, queries.dtype) + head_reasons(queries)
    if queries.shape[3] > 64:
        reasons.append(f"{queries.shape[3]} queries of a group are more than 64")
    return reasons


def _check(queries: Tensor, k: Tensor, slots: Tensor, unit: int) -> None:
    if queries.dim() != 5 or k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (*queries.shape[:2], queries.shape[4]):
        raise ValueError(
            f"queries is {list(queries.shape)}, k {list(k.shape)}; expected [B, H, groups, asking, D] and [B, S, H, D]"
        )
    if queries.dtype != k.dtype or not k.dtype.is_floating_point:
        raise TypeError(f"queries is {queries.dtype}, k {k.dtype}; expected one floating dtype")
    if unit < 16 or unit % 16:
        raise ValueError(f"unit is {unit}; expected a multiple of 16")
    if slots.dim() != 1 or slots.shape[0] % unit or slots.dtype != torch.int32:
        raise ValueError(f"slots is {list(slots.shape)} {slots.dtype}; expected int32 [units * {unit}]")
    if not slots.device == k.device == queries.device:
        raise ValueError(f"queries lies on {queries.device}, k on {k.device}, slots on {slots.device}; expected one")
