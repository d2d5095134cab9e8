"""The shares in Triton: logits are read twice and nothing as large as they is written."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two
from dit_accel.kernels.unit_means.triton import runs_on

__all__ = ["keys", "runs_on", "units"]

LOG2_E = tl.constexpr(math.log2(math.e))
TILE = 1024  # columns looked at together


@triton.jit
def _logits(row_ptr, bias_ptr, at, real, to_log2):
    """The logits of some columns in log2 units, bias included; -inf where there is no column."""
    x = tl.load(row_ptr + at, mask=real, other=0.0) * to_log2
    if bias_ptr is not None:
        x += tl.load(bias_ptr + at, mask=real, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(real, x, float("-inf"))


@triton.jit
def _normal(row_ptr, bias_ptr, columns, to_log2, TILE: tl.constexpr):
    """The largest logit of a row in log2 units and the sum of exp2(logit - largest), each lane its own until the end.

    The sum is NaN where a logit is NaN or +inf.
    """
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, columns, TILE):
        at = first + tl.arange(0, TILE)
        x = _logits(row_ptr, bias_ptr, at, at < columns, to_log2)
        new_top = tl.maximum(top, x)
        # a lane that has seen nothing yet keeps -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.exp2(x - shift)
        top = new_top
    most = tl.max(top, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    return shift, tl.sum(total * tl.exp2(top - shift), 0)


@triton.jit
def _bias_of(bias_ptr, program, heads, stride_b, stride_h):
    """Where the bias of a sample and head begins."""
    return bias_ptr + program // heads * stride_b + program % heads * stride_h


@triton.jit
def _units_kernel(
    logits_ptr, slots_ptr, bias_ptr, out_ptr, bias_stride_b, bias_stride_h, heads, rows, columns, units, to_log2,
    UNIT: tl.constexpr, UNIT_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One row: its normaliser, then its softmax added up over each unit's columns."""
    program = tl.program_id(0).to(tl.int64)
    logits_ptr += program * columns
    out_ptr += program * units
    if bias_ptr is not None:
        bias_ptr = _bias_of(bias_ptr, program // rows, heads, bias_stride_b, bias_stride_h)
    top, total = _normal(logits_ptr, bias_ptr, columns, to_log2, TILE)
    UNITS: tl.constexpr = TILE // UNIT_PAD
    for first in range(0, units, UNITS):
        unit = first + tl.arange(0, UNITS)
        within = tl.arange(0, UNIT_PAD)
        real = (unit < units)[:, None] & (within < UNIT)[None, :]
        at = unit[:, None] * UNIT + within[None, :]
        if slots_ptr is not None:
            at = tl.load(slots_ptr + at, mask=real, other=-1)
            real = real & (at >= 0)
        share = tl.exp2(_logits(logits_ptr, bias_ptr, at, real, to_log2) - top)
        held = tl.sum(tl.where(real, share, 0.0), 1)
        none = tl.sum(real.to(tl.int32), 1) == 0  # such a unit has 0 even in a row that is not finite
        tl.store(out_ptr + unit, tl.where(none, 0.0, held / total), mask=unit < units)


@triton.jit
def _normal_kernel(
    logits_ptr, bias_ptr, normal_ptr, bias_stride_b, bias_stride_h, heads, rows, columns, to_log2, TILE: tl.constexpr,
):  # fmt: skip
    """The normaliser of one row, two numbers."""
    program = tl.program_id(0).to(tl.int64)
    if bias_ptr is not None:
        bias_ptr = _bias_of(bias_ptr, program // rows, heads, bias_stride_b, bias_stride_h)
    top, total = _normal(logits_ptr + program * columns, bias_ptr, columns, to_log2, TILE)
    tl.store(normal_ptr + 2 * program, top)
    tl.store(normal_ptr + 2 * program + 1, total)


@triton.jit
def _keys_kernel(
    logits_ptr, bias_ptr, normal_ptr, out_ptr, bias_stride_b, bias_stride_h, heads, rows, columns, to_log2,
    TILE: tl.constexpr,
):  # fmt: skip
    """Some columns of one head: the softmax added up over all rows."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = at < columns
    if bias_ptr is not None:
        bias_ptr = _bias_of(bias_ptr, program, heads, bias_stride_b, bias_stride_h)
    out = tl.zeros([TILE], tl.float32)
    for row in range(rows):
        here = program * rows + row
        x = _logits(logits_ptr + here * columns, bias_ptr, at, real, to_log2)
        out += tl.exp2(x - tl.load(normal_ptr + 2 * here)) * (1.0 / tl.load(normal_ptr + 2 * here + 1))
    tl.store(out_ptr + program * columns + at, out, mask=real)


def units(logits: Tensor, slots: Tensor | None, unit: int, scale: float, bias: Tensor | None) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `unit_shares`."""
    count = (logits.shape[3] if slots is None else slots.shape[0]) // unit
    out = torch.empty(*logits.shape[:3], count, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        grid, args, constants = launch_units(logits, slots, unit, scale, bias, out)
        _units_kernel[grid](*args, **constants)
    return out


def launch_units(
    logits: Tensor, slots: Tensor | None, unit: int, scale: float, bias: Tensor | None, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, h, r, n = logits.shape
    padded = power_of_two(unit)
    args = (
        logits.contiguous(), None if slots is None else slots.contiguous(), *_bias(bias, out), h, r, n, out.shape[3],
        scale * LOG2_E.value,
    )  # fmt: skip
    return (b * h * r,), args, {"UNIT": unit, "UNIT_PAD": padded, "TILE": max(TILE, padded), "num_warps": 4}


def keys(logits: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Run the kernels on a checked, non-empty call; shapes as in `key_shares`."""
    b, h, r, n = logits.shape
    normal = torch.empty(b, h, r, 2, dtype=torch.float32, device=logits.device)
    out = torch.empty(b, h, n, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        for kernel, (grid, args, constants) in launch_keys(logits, scale, bias, normal, out):
            kernel[grid](*args, **constants)
    return out


def launch_keys(
    logits: Tensor, scale: float, bias: Tensor | None, normal: Tensor, out: Tensor
) -> list[tuple[Any, tuple[tuple[int, ...], tuple, dict[str, Any]]]]:
    """Both kernels in order, with grid, positional arguments and compile-time constants for one call."""
    b, h, r, n = logits.shape
    logits, constants = logits.contiguous(), {"TILE": TILE, "num_warps": 4}
    held, _, *strides = _bias(bias, out)
    tail = (*strides, h, r, n, scale * LOG2_E.value)
    return [
        (_normal_kernel, ((b * h * r,), (logits, held, normal, *tail), constants)),
        (_keys_kernel, ((b * h, -(-n // TILE)), (logits, held, normal, out, *tail), constants)),
    ]


def _bias(bias: Tensor | None, out: Tensor) -> tuple[Tensor | None, Tensor, int, int]:
    """Return the bias, the output, and the bias' strides by sample and head, 0 where all share it."""
    if bias is None:
        return None, out, 0, 0
    bias = bias.contiguous()
    lead = zip(bias.stride()[:2], bias.shape[:2], strict=True)
    first, second = (stride if size > 1 else 0 for stride, size in lead)
    return bias, out, first, second
