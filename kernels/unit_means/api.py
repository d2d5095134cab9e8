"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, dtype_reasons, takes_triton, why_not_triton

Form = Literal["plain", "direction", "apart"]


def unit_means(
    x: Tensor,
    slots: Tensor,
    bounds: int | Tensor,
    *,
    centre: Tensor | None = None,
    form: Form = "plain",
    backend: Backend | None = None,
) -> Tensor:
    """Average the tokens of each unit, where an order says which tokens those are.

    Args:
        x: [B, S, H, D], a floating dtype, any strides.
        slots: int32 [B|1, H|1, L], the token in each slot; -1 is a hole, which counts for nothing. The tokens lie in
            [0, S), which is not checked here: it would stall the device.
        bounds: how many slots each unit has, the last one perhaps fewer; or, where units differ, integers
            [B|1, H|1, units + 1] that do not fall: unit u has the slots from `bounds[u]` up to `bounds[u + 1]`.
        centre: float32 [B|1, H|1, units|1, D], subtracted from each token of a unit first.
        form: what is averaged of each token: itself, its "direction" (it over its length, or over 1e-12 where it is
            shorter), or how far it lies "apart" from the centre (absolute values).
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        float32 [B, H, units, D], contiguous, added up in float32. A unit without tokens has mean 0; a token that is not
        finite makes the mean of its unit, and of no other, not finite.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    The gather of an order and the pooling of block-sparse scores (MInference, Jiang et al. 2024, arXiv 2407.02490;
    SpargeAttention, Zhang et al. 2025, arXiv 2502.18137) in one reading. On CUDA the reference adds up units
    of different lengths in no fixed order; Triton always gives the same result.
    """
    _check(x, slots, bounds)
    _check_form(x, slots, bounds, centre, form)
    if _uses_triton(x, slots, backend):
        from .triton import means
    else:
        from .reference import means
    return means(x, slots, bounds, centre, form).contiguous()


def unit_means_of_two(
    x: Tensor,
    y: Tensor,
    slots: Tensor,
    bounds: int | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    whole: int = 1,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the tokens of each unit in two tensors of one shape and dtype, such as queries and keys, in one launch.

    As `unit_means` of each of them, bit for bit, then rounded to `dtype`; filled up with units of mean 0 to a multiple
    of `whole`.
    """
    _check(x, slots, bounds)
    _check(y, slots, bounds)
    if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
        raise ValueError(f"x is {list(x.shape)} {x.dtype}, y {list(y.shape)} {y.dtype}; expected them alike")
    if _uses_triton(x, slots, backend):
        from .triton import means

        both = means(x, slots, bounds, y=y, dtype=dtype, whole=whole)
        return both[0], both[1]
    from .reference import means

    first, second = (means(one, slots, bounds).to(dtype) for one in (x, y))
    more = -first.shape[2] % whole
    return torch.nn.functional.pad(first, (0, 0, 0, more)), torch.nn.functional.pad(second, (0, 0, 0, more))


def _uses_triton(x: Tensor, slots: Tensor, backend: Backend | None) -> bool:
    return takes_triton(backend, "average x {}", triton_reasons, x) and x.numel() > 0 and slots.numel() > 0


def _check_form(x: Tensor, slots: Tensor, bounds: int | Tensor, centre: Tensor | None, form: str) -> None:
    if form not in ("plain", "direction", "apart"):
        raise ValueError(f"form is {form!r}; known are 'plain', 'direction', 'apart'")
    if centre is None:
        return
    units = -(-slots.shape[-1] // bounds) if isinstance(bounds, int) else bounds.shape[-1] - 1
    wanted = (x.shape[0], x.shape[2], units, x.shape[3])
    fits = centre.dim() == 4 and all(n in (1, m) for n, m in zip(centre.shape[:3], wanted[:3], strict=True))
    if not fits or centre.shape[3] != wanted[3] or centre.dtype != torch.float32 or centre.device != x.device:
        raise ValueError(
            f"centre is {list(centre.shape)} {centre.dtype} on {centre.device}; expected float32 "
            f"[{wanted[0]}|1, {wanted[1]}|1, {units}|1, {wanted[3]}] on {x.device}"
        )


def unsupported_reasons(backend: Backend, x: Tensor) -> list[str]:
    """Why a back end cannot take such a tensor; an empty list when it can."""
    return [] if backend == "reference" else why_not_triton(triton_reasons, x)


def triton_reasons(x: Tensor) -> list[str]:
    """Why the Triton kernel cannot take such a tensor; an empty list when it can."""
    from . import triton

    reasons = triton.runs_on(x.device) + dtype_reasons(x)
    if x.shape[3] > 256:
        reasons.append(f"head dim {x.shape[3]} is above 256")
    return reasons


def _check(x: Tensor, slots: Tensor, bounds: int | Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x is {list(x.shape)}; expected [B, S, H, D]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}; expected a floating dtype")
    lists = {"slots": slots} if isinstance(bounds, int) else {"slots": slots, "bounds": bounds}
    batch, _, heads, _ = x.shape
    for name, tensor in lists.items():
        if tensor.dim() != 3 or tensor.shape[0] not in (1, batch) or tensor.shape[1] not in (1, heads):
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{batch}|1, {heads}|1, ...]")
        if tensor.device != x.device:
            raise ValueError(f"{name} lies on {tensor.device}, x on {x.device}")
        if tensor.dtype not in (torch.int32, torch.int64) or (name == "slots" and tensor.dtype != torch.int32):
            raise TypeError(f"{name} is {tensor.dtype}; expected torch.int32")
    if isinstance(bounds, int):
        if bounds < 1:
            raise ValueError(f"bounds is {bounds}; expected at least 1 slot a unit")
    elif bounds.shape[2] < 1:
        raise ValueError(f"bounds is {list(bounds.shape)}; expected units + 1 numbers")
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            f"x {list(x.shape)}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )
