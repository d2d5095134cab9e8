"""The means in Triton: every token is read once, through the order."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two

INTERPRETED = triton.knobs.runtime.interpret
FORMS = {"plain": 0, "direction": 1, "apart": 2}
DIRECTION, APART = tl.constexpr(1), tl.constexpr(2)
SHORTEST = tl.constexpr(1e-12)  # a vector that is no longer than this has no direction
ELEMENTS, WARPS = 2048, 2  # of a tile: the fastest of twelve on an H200, by units of 64 tokens and of 128


def runs_on(device: torch.device) -> list[str]:
    """Why the kernel cannot run on this device; an empty list when it can."""
    if device.type == "cuda" or INTERPRETED:
        return []
    return [f"device {device} is not CUDA (set TRITON_INTERPRET=1 before Triton is imported to interpret)"]


@triton.jit
def _mean(
    x_ptr, slots_ptr, centre_ptr, first, last, stride_s, stride_d,
    FORM: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The mean of the tokens in some slots of one head, each in the asked form: ROWS running sums, then one."""
    d = tl.arange(0, D_PAD)
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + d, mask=d < D, other=0.0)[None, :]
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    held = tl.zeros([ROWS], tl.int32)
    for at in range(first, last, ROWS):
        slot = at + tl.arange(0, ROWS)
        token = tl.load(slots_ptr + slot, mask=slot < last, other=-1)  # [ROWS]
        real = token >= 0
        x_at = x_ptr + token.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
        x = tl.load(x_at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if centre_ptr is not None:
            x = tl.where(real[:, None], x - centre, 0.0)
        if FORM == DIRECTION:
            x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SHORTEST)[:, None]
        elif FORM == APART:
            x = tl.abs(x)
        acc += x
        held += real.to(tl.int32)
    return tl.sum(acc, 0) / tl.maximum(tl.sum(held, 0), 1).to(tl.float32)


@triton.jit
def _means_kernel(
    x_ptr, y_ptr, slots_ptr, bounds_ptr, centre_ptr, out_ptr, x_stride_b, x_stride_s, x_stride_h, x_stride_d,
    y_stride_b, y_stride_s, y_stride_h, y_stride_d,
    slots_stride_b, slots_stride_h, bounds_stride_b, bounds_stride_h,
    centre_stride_b, centre_stride_h, centre_stride_u, slots, unit, units, heads, rows,
    FORM: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One unit of one head, of the first tensor or of the second."""
    program = tl.program_id(0)  # heads side by side: their rows of a token are neighbours in memory
    h, u = (program % heads).to(tl.int64), (program // heads) % units
    b = (program // heads // units).to(tl.int64)
    if bounds_ptr is not None:
        bounds_ptr += b * bounds_stride_b + h * bounds_stride_h + u
        first = tl.load(bounds_ptr).to(tl.int32)
        last = tl.minimum(tl.load(bounds_ptr + 1).to(tl.int32), slots)
    else:
        first = u * unit
        last = tl.minimum(first + unit, slots)
    slots_ptr += b * slots_stride_b + h * slots_stride_h
    x_ptr += b * x_stride_b + h * x_stride_h
    if centre_ptr is not None:
        centre_ptr += b * centre_stride_b + h * centre_stride_h + u * centre_stride_u
    row = (b * heads + h) * units + u
    if y_ptr is not None:
        if tl.program_id(1) == 1:
            y_ptr += b * y_stride_b + h * y_stride_h
            mean = _mean(y_ptr, slots_ptr, centre_ptr, first, last, y_stride_s, y_stride_d, FORM, D, D_PAD, ROWS)
            row += rows
        else:
            mean = _mean(x_ptr, slots_ptr, centre_ptr, first, last, x_stride_s, x_stride_d, FORM, D, D_PAD, ROWS)
    else:
        mean = _mean(x_ptr, slots_ptr, centre_ptr, first, last, x_stride_s, x_stride_d, FORM, D, D_PAD, ROWS)
    d = tl.arange(0, D_PAD)
    tl.store(out_ptr + row * D + d, mean.to(out_ptr.dtype.element_ty), mask=d < D)


def means(
    x: Tensor,
    slots: Tensor,
    bounds: int | Tensor,
    centre: Tensor | None = None,
    form: str = "plain",
    y: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    whole: int = 1,
) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `unit_means`, with a second tensor two in front."""
    b, _, h, d = x.shape
    units = -(-slots.shape[-1] // bounds) if isinstance(bounds, int) else bounds.shape[-1] - 1
    held = -(-units // whole) * whole
    out = torch.empty((b, h, held, d) if y is None else (2, b, h, held, d), dtype=dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            grid, args, constants = launch(x, slots, bounds, out, centre, form, y)
            _means_kernel[grid](*args, **constants)
    return out


def launch(
    x: Tensor,
    slots: Tensor,
    bounds: int | Tensor,
    out: Tensor,
    centre: Tensor | None = None,
    form: str = "plain",
    y: Tensor | None = None,
) -> tuple[tuple[int, int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, _, h, d = x.shape
    units, padded = out.shape[-2], power_of_two(d, 16)
    slots = slots.contiguous()
    centre = None if centre is None else centre.contiguous()
    edges = None if isinstance(bounds, int) else bounds.contiguous()
    args = (
        x, y, slots, edges, centre, out, *x.stride(), *((0,) * 4 if y is None else y.stride()), *_strides(slots),
        *((0, 0) if edges is None else _strides(edges)), *_centre_strides(centre), slots.shape[-1],
        bounds if isinstance(bounds, int) else 0, units, h, b * h * units,
    )  # fmt: skip
    rows = ELEMENTS // padded
    if isinstance(bounds, int):
        rows = min(rows, power_of_two(bounds))
    return (
        (b * units * h, 1 if y is None else 2),
        args,
        {"FORM": FORMS[form], "D": d, "D_PAD": padded, "ROWS": max(rows, 16), "num_warps": WARPS},
    )


def _centre_strides(centre: Tensor | None) -> tuple[int, int, int]:
    """Strides over samples, heads and units, 0 where all are alike."""
    if centre is None:
        return 0, 0, 0
    return *_strides(centre), centre.stride(2) if centre.shape[2] > 1 else 0


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Strides over samples and heads, 0 where all are alike."""
    batch, heads, *_ = tensor.stride()
    return 0 if tensor.shape[0] == 1 else batch, 0 if tensor.shape[1] == 1 else heads
