"""The error in Triton: one pass over keys and values; every unit by itself, so that all may run side by side.

With top the largest product of a unit, a unit leaves top, |sum_j exp(c (s_j - top)) v_j - n exp(c (s̄ - top)) v̄| and
sum_j exp(c (s_j - top)), c the scale. Only these, three numbers for each query and unit, meet those of other units.
Products are scaled after the subtraction: before it, rounding would grow with their size.
"""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_mass.triton import vectors_of
from dit_accel.kernels.block_sparse.triton import _capability, runs_on
from dit_accel.kernels.sizes import power_of_two

__all__ = ["launch", "lengths", "runs_on", "sharing"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))
UNITS = 16  # that a program does one after the other


@dataclass(frozen=True)
class Tile:
    """How one program works: queries by slots of a tile, warps, depth of the load pipeline."""

    rows: int
    slots: int
    warps: int
    stages: int


def choose(capability: tuple[int, int], padded_dim: int, itemsize: int) -> Tile:
    """The tile for one launch: by shared memory and registers, for (9, 0) also the fastest of six on an H200."""
    if itemsize == 4:
        return Tile(32, 32, 8, 2)
    if padded_dim > 128:
        return Tile(64, 32, 8, 2)
    return Tile(64, 64, 8 if capability >= (10, 0) else 4, 3 if capability == (9, 0) else 2)


@triton.jit
def _error_kernel(
    q_ptr, k_ptr, v_ptr, slots_ptr, bounds_ptr, means_v_ptr, top_ptr, error_ptr, total_ptr,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    slots_stride_b, slots_stride_h, bounds_stride_b, bounds_stride_h, heads, rows, units, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, UNITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries of one head and some units: the largest product, and error and sum relative to it."""
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    q_ptr += bh * rows * D
    q = vectors_of(q_ptr, tl.minimum(row, rows - 1), D, 1, D, D_PAD).to(k_ptr.dtype.element_ty)
    if INTERPRETED:
        q = q.to(tl.float32)
    k_ptr += b * k_stride_b + h * k_stride_h
    v_ptr += b * v_stride_b + h * v_stride_h
    slots_ptr += b * slots_stride_b + h * slots_stride_h
    bounds_ptr += b * bounds_stride_b + h * bounds_stride_h
    # the tiles of all units in one loop, so that the next unit's keys are on their way while this one is put together;
    # whose tile comes is a sum over the units, since what one turn hands the next could not run ahead of it
    mine = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    start = tl.load(bounds_ptr + mine, mask=mine < units, other=0).to(tl.int32)
    stop = tl.load(bounds_ptr + mine + 1, mask=mine < units, other=0).to(tl.int32)
    tiles = tl.where(mine < units, tl.maximum(tl.cdiv(stop - start, TILE_K), 1), 0)
    upto = tl.cumsum(tiles, 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    middle = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D_PAD], tl.float32)
    tokens = 0
    for tile in range(tl.sum(tiles, 0)):
        here = (tile < upto) & (tile >= upto - tiles)
        nth = tile - tl.sum(tl.where(here, upto - tiles, 0), 0)
        first = tl.sum(tl.where(here, start, 0), 0) + nth * TILE_K
        end, unit = tl.sum(tl.where(here, stop, 0), 0), tl.sum(tl.where(here, mine, 0), 0)
        slot = first + tl.arange(0, TILE_K)
        token = tl.load(slots_ptr + slot, mask=slot < end, other=-1)
        real = token >= 0
        tokens = tl.where(nth == 0, 0, tokens) + tl.sum(real.to(tl.int32), 0)
        top, total = tl.where(nth == 0, float("-inf"), top), tl.where(nth == 0, 0.0, total)
        middle, out = tl.where(nth == 0, 0.0, middle), tl.where(nth == 0, 0.0, out)
        k = vectors_of(k_ptr, tl.maximum(token, 0), k_stride_s, k_stride_d, D, D_PAD)
        v = vectors_of(v_ptr, tl.maximum(token, 0), v_stride_s, v_stride_d, D, D_PAD)
        products = tl.dot(q, k.T, input_precision=PRECISION)
        middle += tl.sum(tl.where(real[None, :], products, 0.0), 1)
        products = tl.where(real[None, :], products, float("-inf"))
        new_top = tl.maximum(top, tl.max(products, 1))
        # a unit that has shown no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, kept = tl.exp2((products - shift[:, None]) * to_log2), tl.exp2((top - shift) * to_log2)
        total = total * kept + tl.sum(weights, 1)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
        if first + TILE_K >= end:
            mean_v = tl.load(means_v_ptr + (bh * units + unit) * D + d, mask=d < D, other=0.0)
            # the mean key's product is the mean of its keys' products
            pooled = tl.exp2((middle / tl.maximum(tokens, 1) - shift) * to_log2) * tokens
            apart = out - tl.where(tokens > 0, pooled[:, None] * mean_v[None, :], 0.0)
            place = (bh * rows + row) * units + unit
            tl.store(top_ptr + place, top, mask=row < rows)
            tl.store(error_ptr + place, tl.sqrt(tl.sum(apart * apart, 1)), mask=row < rows)
            tl.store(total_ptr + place, total, mask=row < rows)


@triton.jit
def _share_kernel(top_ptr, error_ptr, total_ptr, units, to_log2, UNITS: tl.constexpr):
    """The errors of one row over the sum of all its units, in place."""
    first_unit = tl.program_id(0).to(tl.int64) * units
    mine = tl.arange(0, UNITS)
    top = tl.full([UNITS], float("-inf"), tl.float32)
    for first in range(0, units, UNITS):
        top = tl.maximum(
            top, tl.load(top_ptr + first_unit + first + mine, mask=first + mine < units, other=float("-inf"))
        )
    most, total = tl.max(top, 0), tl.zeros([UNITS], tl.float32)
    for first in range(0, units, UNITS):
        at, ok = first_unit + first + mine, first + mine < units
        weight = tl.exp2((tl.load(top_ptr + at, mask=ok, other=float("-inf")) - most) * to_log2)
        total += tl.where(ok, tl.load(total_ptr + at, mask=ok, other=0.0) * weight, 0.0)
    whole = tl.sum(total, 0)
    for first in range(0, units, UNITS):
        at, ok = first_unit + first + mine, first + mine < units
        weight = tl.exp2((tl.load(top_ptr + at, mask=ok, other=float("-inf")) - most) * to_log2)
        tl.store(error_ptr + at, tl.load(error_ptr + at, mask=ok, other=0.0) * weight / whole, mask=ok)


def lengths(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    bounds: Tensor,
    block: int,
    means_v: Tensor,
    scale: float,
) -> Tensor:
    """Run the kernels on a checked, non-empty call; shapes as in `unit_error`. They do not ask for `block`."""
    made = torch.empty(3, *queries.shape[:3], means_v.shape[2], dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        grid, args, constants = launch(queries, k, v, slots, bounds, means_v, scale, made)
        _error_kernel[grid](*args, **constants)
        grid, args, constants = sharing(made, scale)
        _share_kernel[grid](*args, **constants)
    return made[1]


def sharing(made: Tensor, scale: float) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel that puts the units of a row together."""
    units = made.shape[-1]
    constants = {"UNITS": min(power_of_two(units, 16), 1024), "num_warps": 4}
    return (made[0, ..., 0].numel(),), (*made, units, scale * LOG2_E.value), constants


def launch(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    bounds: Tensor,
    means_v: Tensor,
    scale: float,
    made: Tensor,
    tile: Tile | None = None,
) -> tuple[tuple[int, int, int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, h, rows, dim = queries.shape
    units, padded = bounds.shape[2] - 1, power_of_two(dim, 16)
    tile = tile or choose(_capability(k.device), padded, k.element_size())
    slots, bounds = slots.contiguous(), bounds.contiguous()
    lead = (s if n > 1 else 0 for x in (slots, bounds) for s, n in zip(x.stride()[:2], x.shape[:2], strict=True))
    args = (
        queries.contiguous(), k, v, slots, bounds, means_v.contiguous(), *made, *k.stride(), *v.stride(), *lead,
        h, rows, units, scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim, "D_PAD": padded, "ROWS": tile.rows, "TILE_K": tile.slots, "UNITS": UNITS,
        "PRECISION": "ieee" if k.element_size() == 4 else "tf32", "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (-(-rows // tile.rows), -(-units // UNITS), b * h), args, constants
