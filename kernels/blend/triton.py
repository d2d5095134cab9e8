"""The blend in Triton: one reading and one writing of the outputs."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two

ELEMENTS = 8192  # of a program


@triton.jit
def _blend_kernel(
    out_ptr, kept_ptr, rest_ptr, unit_ptr, made_ptr, stride_b, stride_s, stride_h, stride_d, unit_stride_b,
    unit_stride_h, unit_stride_s, length, heads, units, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one head."""
    pid = tl.program_id(0)
    h, tile, b = pid % heads, ((pid // heads) % tiles), ((pid // heads) // tiles).to(tl.int64)  # heads lie side by side
    token = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = tl.arange(0, D_PAD)
    ok = token < length
    inside = ok[:, None] & (d < D)[None, :]
    unit = tl.load(unit_ptr + b * unit_stride_b + h * unit_stride_h + token * unit_stride_s, mask=ok, other=0)
    unit += (b * heads + h) * units
    out_at = out_ptr + b * stride_b + h * stride_h + token[:, None] * stride_s + d[None, :] * stride_d
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(kept_ptr + unit, mask=ok, other=0.0)
    rest = tl.load(rest_ptr + unit[:, None] * D + d[None, :], mask=inside, other=0.0)
    made = (out * kept[:, None] + rest).to(made_ptr.dtype.element_ty)
    tl.store(made_ptr + ((b * length + token) * heads + h)[:, None] * D + d[None, :], made, mask=inside)


def run(out: Tensor, kept: Tensor, rest: Tensor, unit: Tensor) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `blend`."""
    made = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    with torch.cuda.device_of(out):
        grid, args, constants = launch(out, kept, rest, unit, made)
        _blend_kernel[grid](*args, **constants)
    return made


def launch(
    out: Tensor, kept: Tensor, rest: Tensor, unit: Tensor, made: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, s, h, d = out.shape
    padded = power_of_two(d, 16)
    tokens = max(1, ELEMENTS // padded)
    tiles = -(-s // tokens)
    of_unit = (stride if n > 1 else 0 for stride, n in zip(unit.stride(), unit.shape, strict=True))
    kept, rest = kept.float().contiguous(), rest.float().contiguous()
    args = (out, kept, rest, unit, made, *out.stride(), *of_unit, s, h, kept.shape[2], tiles)
    return (tiles * h * b,), args, {"D": d, "D_PAD": padded, "TOKENS": tokens, "num_warps": 4}
