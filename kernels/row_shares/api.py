"""The doors of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, takes_triton

from .op import keys_op, units_op


def unit_shares(
    logits: Tensor,
    slots: Tensor | None,
    unit: int,
    scale: float,
    bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return which share of each row's softmax every unit of columns holds.

    Args:
        logits: float32 [B, H, R, N], unscaled products of a few queries and all keys.
        slots: int32 [units * unit], the column in each slot of a unit, -1 a hole; None: unit after unit as they lie.
            Columns in no slot count in the softmax and belong to no unit.
        unit: slots of a unit.
        scale: what logits are multiplied by, above 0.
        bias: floating [B|1, H|1, N], added to the scaled logits.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        float32 [B, H, R, units]. A row with NaN or +Inf has NaN in every unit that holds a column.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this.

    What sampled rows are read for by MInference (Jiang et al. 2024, arXiv 2407.02490), and the sums over blocks of
    XAttention (Xu et al. 2025, arXiv 2503.16428).
    """
    if torch.compiler.is_compiling():
        return units_op(logits, slots, unit, scale, bias, backend)
    _check(logits, scale, bias)
    length = logits.shape[3] if slots is None else slots.shape[0]
    if unit < 1 or length % unit:
        raise ValueError(f"unit is {unit}; expected to divide {length} slots")
    if slots is not None and (slots.dim() != 1 or slots.dtype != torch.int32 or slots.device != logits.device):
        raise ValueError(f"slots is {list(slots.shape)} {slots.dtype}; expected int32 [units * {unit}] beside logits")
    if _uses_triton(logits, backend):
        from .triton import units
    else:
        from .reference import units
    return units(logits, slots, unit, scale, bias)


def key_shares(logits: Tensor, scale: float, bias: Tensor | None = None, *, backend: Backend | None = None) -> Tensor:
    """Return the softmax of rows added up over the rows, float32 [B, H, N]; arguments as in `unit_shares`."""
    if torch.compiler.is_compiling():
        return keys_op(logits, scale, bias, backend)
    _check(logits, scale, bias)
    if _uses_triton(logits, backend):
        from .triton import keys
    else:
        from .reference import keys
    return keys(logits, scale, bias)


def _uses_triton(logits: Tensor, backend: Backend | None) -> bool:
    return takes_triton(backend, "sum {}", _triton_reasons, logits) and logits.numel() > 0


def _triton_reasons(logits: Tensor) -> list[str]:
    from . import triton

    return triton.runs_on(logits.device)


def _check(logits: Tensor, scale: float, bias: Tensor | None) -> None:
    if logits.dim() != 4 or logits.dtype != torch.float32:
        raise ValueError(f"logits is {list(logits.shape)} {logits.dtype}; expected float32 [B, H, R, N]")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected above 0")
    if bias is not None:
        b, h, _, n = logits.shape
        lead = bias.dim() == 3 and bias.shape[0] in (1, b) and bias.shape[1] in (1, h)
        if not lead or bias.shape[2] != n or not bias.dtype.is_floating_point or bias.device != logits.device:
            raise ValueError(
                f"bias is {list(bias.shape)} {bias.dtype} on {bias.device}; expected floating [{b}|1, {h}|1, {n}] "
                f"on {logits.device}"
            )
