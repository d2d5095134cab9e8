"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, head_reasons, takes_triton

from .op import mass_op


def block_mass(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    key_bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Average the exact attention of each query unit's tokens, and add it up over each key unit's.

    Args:
        q, k: [B, S, H, D], a floating dtype, any strides.
        q_slots, k_slots: int32 [units * unit], the token in each slot, -1 a hole; no token occurs twice. The softmax is
            over the keys in `k_slots`; the tokens lie in [0, S), which is not checked here: it would stall the device.
        unit: slots of a unit, a multiple of 16.
        scale: factor of the logits.
        key_bias: floating [B|1, H|1, S], added to the logits; -inf masks a key.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        float32 [B, H, query units, key units]. A query unit without tokens has 0. A query that is not finite, or has no
        key, makes its unit's row not finite.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    AdaSpa, Xia et al. 2025, arXiv 2502.21079: two passes over the keys, the second with the log-sum-exp of the first.
    """
    if torch.compiler.is_compiling():
        return mass_op(q, k, q_slots, k_slots, unit, scale, key_bias, backend)
    check_units(q, k, q_slots, k_slots, unit)
    if key_bias is not None:
        _check_bias(q, key_bias)
    if uses_triton(q, q_slots, k_slots, backend):
        from .triton import mass
    else:
        from .reference import mass
    return mass(q, k, q_slots, k_slots, unit, scale, key_bias)


def block_mass_and_lse(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    key_bias: Tensor | None = None,
    lse: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums of exp(logit - lse) as `block_mass` returns those of the softmax, and the log-sum-exps.

    `lse` float32 [B, H, len(q_slots)]: those of an earlier call, which spare the first pass over the keys; None finds
    them. They are returned as they are used; in a hole they mean nothing.
    """
    check_units(q, k, q_slots, k_slots, unit)
    if key_bias is not None:
        _check_bias(q, key_bias)
    shape = (q.shape[0], q.shape[2], len(q_slots))
    if lse is not None and (tuple(lse.shape) != shape or lse.dtype != torch.float32 or lse.device != q.device):
        raise ValueError(f"lse is {list(lse.shape)} {lse.dtype}; expected float32 {list(shape)} on {q.device}")
    if uses_triton(q, q_slots, k_slots, backend):
        from .triton import mass_and_lse
    else:
        from .reference import mass_and_lse
    return mass_and_lse(q, k, q_slots, k_slots, unit, scale, key_bias, lse)


def uses_triton(q: Tensor, q_slots: Tensor, k_slots: Tensor, backend: Backend | None) -> bool:
    """Whether pairs of units are looked at in Triton; raises where a named back end cannot."""
    return takes_triton(backend, "attend q {}", _triton_reasons, q) and min(q.numel(), len(q_slots), len(k_slots)) > 0


def _triton_reasons(q: Tensor) -> list[str]:
    from . import triton

    return triton.runs_on(q.device, q.dtype) + head_reasons(q)


def check_units(q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int) -> None:
    """Raise where queries, keys and their slots do not belong together."""
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q is {list(q.shape)}, k {list(k.shape)}; expected both [B, S, H, D]")
    if q.dtype != k.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"q is {q.dtype}, k {k.dtype}; expected one floating dtype")
    if unit < 16 or unit % 16:
        raise ValueError(f"unit is {unit}; expected a multiple of 16")
    for name, slots in (("q_slots", q_slots), ("k_slots", k_slots)):
        if slots.dim() != 1 or slots.shape[0] % unit or slots.dtype != torch.int32:
            raise ValueError(f"{name} is {list(slots.shape)} {slots.dtype}; expected int32 [units * {unit}]")
        if slots.device != q.device or k.device != q.device:
            raise ValueError(f"q lies on {q.device}, k on {k.device}, {name} on {slots.device}; expected one device")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError(
            f"q {list(q.shape)}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )


def _check_bias(q: Tensor, bias: Tensor) -> None:
    b, s, h, _ = q.shape
    lead = bias.dim() == 3 and bias.shape[0] in (1, b) and bias.shape[1] in (1, h)
    if not lead or bias.shape[2] != s or not bias.dtype.is_floating_point or bias.device != q.device:
        raise ValueError(
            f"key_bias is {list(bias.shape)} {bias.dtype} on {bias.device}; expected floating [{b}|1, {h}|1, {s}] "
            f"on {q.device}"
        )
