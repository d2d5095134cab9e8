"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, dtype_reasons, takes_triton, why_not_triton
from dit_accel.kernels.sizes import power_of_two

from .op import ada_norm_op

LARGEST = 16_384  # channels that a program holds in registers


def ada_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Normalise each token, scale and shift it by its sample's own vectors, reading and writing it once.

    Args:
        x: [B, S, C], a floating dtype, any strides.
        scale, shift: [B, C] in x's dtype, any strides.
        eps: added to the variance.
        weight, bias: [C] in x's dtype, of the norm itself; None multiplies by one and adds nothing.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        layer_norm(x) * (1 + scale) + shift, [B, S, C], contiguous, in x's dtype. The norm is taken in float32; it,
        1 + scale, the product and the sum are each rounded to x's dtype, as by torch's operations one by one.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    Layer norm: Ba et al. 2016, arXiv 1607.06450. Adaptive, in diffusion transformers: Peebles and Xie 2023, arXiv
    2212.09748.
    """
    if torch.compiler.is_compiling() or x.is_meta:  # traced, or only counted
        return ada_norm_op(x, scale, shift, eps, weight, bias, backend)
    _check(x, scale, shift, weight, bias)
    if takes_triton(backend, "take x {}", _triton_reasons, x):
        from .triton import modulated
    else:
        from .reference import modulated
    return modulated(x, scale, shift, eps, weight, bias)


def unsupported_reasons(backend: Backend, x: Tensor) -> list[str]:
    """Why a back end cannot take such tokens [B, S, C]; an empty list when it can."""
    return [] if backend == "reference" else why_not_triton(_triton_reasons, x)


def _triton_reasons(x: Tensor) -> list[str]:
    from . import triton

    reasons = triton.runs_on(x.device) + dtype_reasons(x)
    if power_of_two(x.shape[-1]) > LARGEST:
        reasons.append(f"{x.shape[-1]} channels are more than {LARGEST}")
    return reasons


def _check(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if x.dim() != 3 or not x.shape[2]:
        raise ValueError(f"x is {list(x.shape)}; expected [B, S, C] with channels")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}; expected a floating dtype")
    batch, _, channels = x.shape
    given = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        if tensor is None:
            continue
        wanted = (batch, channels) if name in ("scale", "shift") else (channels,)
        if tuple(tensor.shape) != wanted or (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; "
                f"expected {list(wanted)} {x.dtype} on {x.device}"
            )
    for name, tensor in {"x": x, **given}.items():
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: a gradient is asked for, but this operation has no backward pass; "
                "call it under torch.no_grad() or detach its inputs"
            )
