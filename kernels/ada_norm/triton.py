"""Layer norm, scale and shift in Triton: one program takes one token and reads it once."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.rounding import INTERPRETED, rounded
from dit_accel.kernels.sizes import power_of_two

ELEMENTS = 1024  # channels for each warp: 32 numbers a thread


def runs_on(device: torch.device) -> list[str]:
    """Why the kernel cannot run on this device; an empty list when it can."""
    if device.type in ("cuda", "meta") or INTERPRETED.value:  # on meta tensors nothing runs
        return []
    return [f"device {device} is not CUDA (set TRITON_INTERPRET=1 before Triton is imported to interpret)"]


@triton.jit
def _ada_norm_kernel(
    x_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, x_stride_b, x_stride_s, x_stride_c, scale_stride_b,
    scale_stride_c, shift_stride_b, shift_stride_c, length, eps, C: tl.constexpr, C_PAD: tl.constexpr,
):  # fmt: skip
    """One token of one sample, every step rounded to its dtype as torch's operations would."""
    dtype = out_ptr.dtype.element_ty
    token, b = (tl.program_id(0) % length).to(tl.int64), (tl.program_id(0) // length).to(tl.int64)
    c = tl.arange(0, C_PAD)
    real = c < C
    x = tl.load(x_ptr + b * x_stride_b + token * x_stride_s + c * x_stride_c, mask=real, other=0.0).to(tl.float32)
    x = tl.where(real, x - tl.sum(x, 0) / C, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    if weight_ptr is not None:
        x = x * tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    x = rounded(x, dtype)
    scale = tl.load(scale_ptr + b * scale_stride_b + c * scale_stride_c, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride_b + c * shift_stride_c, mask=real, other=0.0).to(tl.float32)
    x = rounded(x * rounded(1 + scale, dtype), dtype)
    at = tl.program_id(0).to(tl.int64) * C
    tl.store(out_ptr + at + c, rounded(x + shift, dtype).to(dtype), mask=real)


def modulated(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Run the kernel on a checked call; arguments as in `ada_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        grid, args, constants = launch(x, scale, shift, eps, weight, bias, out)
        with torch.cuda.device_of(x):
            _ada_norm_kernel[grid](*args, **constants)
    return out


def launch(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel."""
    batch, length, channels = x.shape
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    args = (x, scale, shift, weight, bias, out, *x.stride(), *scale.stride(), *shift.stride(), length, float(eps))
    padded = power_of_two(channels, 16)
    constants = {
        "C": channels,
        "C_PAD": padded,
        "num_warps": min(max(padded // ELEMENTS, 1), 16),
        "enable_fp_fusion": False,  # a fused product and sum would skip a rounding that stock makes
    }
    return (batch * length,), args, constants
