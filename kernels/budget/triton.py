"""Budgets in Triton: scores become integers of the same order, and the limit is found bit by bit, without a sort."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two
from dit_accel.kernels.unit_means.triton import runs_on

__all__ = ["dense_rows", "heads", "orderable", "padded_columns", "rows", "runs_on", "warps_for"]

LOWEST = tl.constexpr(-(2**31))  # below every score's key
ELEMENTS = 8192  # of a tile of several rows


@triton.jit
def orderable(x):
    """Integers in the order of the floats `x`, none of them NaN; -0 counts as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _keys(score, keep, inside):
    """The rank of some pairs as integers, kept and undecidable ones first, and which those are."""
    first = (keep != 0) | ~(tl.abs(score) < float("inf"))  # NaN compares false
    return tl.where(inside, orderable(tl.where(first, float("inf"), score)), LOWEST), first & inside


@triton.jit
def _rows_kernel(
    score_ptr, keep_ptr, cost_ptr, budget_ptr, out_ptr, score_stride_b, score_stride_h, score_stride_r,
    keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c, cost_stride_b, cost_stride_h,
    budget_stride_b, budget_stride_h, budget_stride_r, share, heads, rows, columns, C_PAD: tl.constexpr,
):  # fmt: skip
    """One row: the largest key at which what ranks no lower costs more than the budget, then who is above it."""
    program = tl.program_id(0).to(tl.int64)
    row, h, b = program % rows, program // rows % heads, program // rows // heads
    column = tl.arange(0, C_PAD)
    inside = column < columns
    score_ptr += b * score_stride_b + h * score_stride_h + row * score_stride_r
    keep_ptr += b * keep_stride_b + h * keep_stride_h + row * keep_stride_r
    score = tl.load(score_ptr + column, mask=inside, other=0.0)
    keep = tl.load(keep_ptr + column * keep_stride_c, mask=inside, other=0)
    cost = tl.load(cost_ptr + b * cost_stride_b + h * cost_stride_h + column, mask=inside, other=0.0)
    key, first = _keys(score, keep, inside)
    if budget_ptr is not None:
        budget = tl.load(budget_ptr + b * budget_stride_b + h * budget_stride_h + row * budget_stride_r)
    else:
        budget = share * tl.sum(cost, 0)

    limit = tl.where(tl.sum(tl.where(key >= 0, cost, 0.0), 0) > budget, 0, LOWEST)
    step = 1 << 30
    for _ in range(31):
        trial = limit + step
        limit = tl.where(tl.sum(tl.where(key >= trial, cost, 0.0), 0) > budget, trial, limit)
        step = step // 2

    above = key > limit
    equal = inside & (key == limit)  # of equal ones the first are taken
    spent = tl.sum(tl.where(above, cost, 0.0), 0) + tl.cumsum(tl.where(equal, cost, 0.0), 0)
    taken = above | (equal & (spent - cost / 2 <= budget))
    top = tl.min(tl.where(inside & (key == tl.max(key, 0)), column, C_PAD), 0)
    out = taken | (column == top) | first
    tl.store(out_ptr + program * columns + column, out.to(tl.uint8), mask=inside)


@triton.jit
def _row_sums(
    score_ptr, keep_ptr, cost, first, limit, score_stride_r, keep_stride_r, keep_stride_c, rows, columns,
    EQUAL: tl.constexpr, ROWS: tl.constexpr, C_PAD: tl.constexpr,
):  # fmt: skip
    """What the pairs of a few rows cost whose keys equal the limit, or reach it, counted in their columns [ROWS]."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, C_PAD)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row = row.to(tl.int64)
    score = tl.load(score_ptr + row[:, None] * score_stride_r + column[None, :], mask=inside, other=0.0)
    keep_at = keep_ptr + row[:, None] * keep_stride_r + column[None, :] * keep_stride_c
    key, _ = _keys(score, tl.load(keep_at, mask=inside, other=0), inside)
    counted = key == limit if EQUAL else key >= limit
    return tl.sum(tl.where(counted & inside, cost[None, :], 0), 1)


@triton.jit
def _limit_kernel(
    score_ptr, keep_ptr, row_cost_ptr, col_cost_ptr, limit_ptr, budget_ptr, before_ptr,
    score_stride_b, score_stride_h, score_stride_r, keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    row_stride_b, row_stride_h, col_stride_b, col_stride_h, share, heads, rows, columns,
    ROWS: tl.constexpr, C_PAD: tl.constexpr,
):  # fmt: skip
    """One head: the limit over all its rows, and what is spent before the pairs of each row that lie at the limit."""
    program = tl.program_id(0).to(tl.int64)
    h, b = program % heads, program // heads
    score_ptr += b * score_stride_b + h * score_stride_h
    keep_ptr += b * keep_stride_b + h * keep_stride_h
    row_cost_ptr += b * row_stride_b + h * row_stride_h
    column = tl.arange(0, C_PAD)
    col_at = col_cost_ptr + b * col_stride_b + h * col_stride_h + column
    cost = tl.load(col_at, mask=column < columns, other=0.0).to(tl.int32)
    lane = tl.arange(0, ROWS)
    tokens = tl.zeros([ROWS], tl.int64)
    for first in range(0, rows, ROWS):
        tokens += tl.load(row_cost_ptr + first + lane, mask=first + lane < rows, other=0.0).to(tl.int64)
    budget = share * (tl.sum(tokens, 0) * tl.sum(cost.to(tl.int64), 0)).to(tl.float32)

    limit = tl.full([], LOWEST, tl.int32)
    step = 1 << 30
    for bit in range(32):
        trial = tl.where(bit == 0, 0, limit + step)
        spent = tl.zeros([ROWS], tl.int64)
        for first in range(0, rows, ROWS):
            weight = tl.load(row_cost_ptr + first + lane, mask=first + lane < rows, other=0.0).to(tl.int64)
            spent += weight * _row_sums(
                score_ptr, keep_ptr, cost, first, trial, score_stride_r, keep_stride_r, keep_stride_c, rows, columns,
                False, ROWS, C_PAD,
            )  # fmt: skip
        limit = tl.where(tl.sum(spent, 0).to(tl.float64) > budget.to(tl.float64), trial, limit)
        step = tl.where(bit == 0, step, step // 2)

    above = tl.zeros([ROWS], tl.int64)
    for first in range(0, rows, ROWS):
        weight = tl.load(row_cost_ptr + first + lane, mask=first + lane < rows, other=0.0).to(tl.int64)
        above += weight * _row_sums(
            score_ptr, keep_ptr, cost, first, limit + 1, score_stride_r, keep_stride_r, keep_stride_c, rows, columns,
            False, ROWS, C_PAD,
        )  # fmt: skip
    seen = tl.sum(above, 0)
    for first in range(0, rows, ROWS):
        weight = tl.load(row_cost_ptr + first + lane, mask=first + lane < rows, other=0.0).to(tl.int64)
        equal = weight * _row_sums(
            score_ptr, keep_ptr, cost, first, limit, score_stride_r, keep_stride_r, keep_stride_c, rows, columns,
            True, ROWS, C_PAD,
        )  # fmt: skip
        before = seen + tl.cumsum(equal, 0) - equal
        tl.store(before_ptr + program * rows + first + lane, before, mask=first + lane < rows)
        seen += tl.sum(equal, 0)
    tl.store(limit_ptr + program, limit)
    tl.store(budget_ptr + program, budget)


@triton.jit
def _cut_kernel(
    score_ptr, keep_ptr, row_cost_ptr, col_cost_ptr, limit_ptr, budget_ptr, before_ptr, out_ptr,
    score_stride_b, score_stride_h, score_stride_r, keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    row_stride_b, row_stride_h, col_stride_b, col_stride_h, heads, rows, columns, C_PAD: tl.constexpr,
):  # fmt: skip
    """One row of a head whose limit is known."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program % rows, program // rows
    h, b = head % heads, head // heads
    column = tl.arange(0, C_PAD)
    inside = column < columns
    score_ptr += b * score_stride_b + h * score_stride_h + row * score_stride_r
    keep_ptr += b * keep_stride_b + h * keep_stride_h + row * keep_stride_r
    score = tl.load(score_ptr + column, mask=inside, other=0.0)
    key, first = _keys(score, tl.load(keep_ptr + column * keep_stride_c, mask=inside, other=0), inside)
    col_at = col_cost_ptr + b * col_stride_b + h * col_stride_h + column
    weight = tl.load(row_cost_ptr + b * row_stride_b + h * row_stride_h + row).to(tl.int64)
    cost = weight * tl.load(col_at, mask=inside, other=0.0).to(tl.int64)
    limit = tl.load(limit_ptr + head)
    equal = inside & (key == limit)
    twice = 2 * (tl.load(before_ptr + program) + tl.cumsum(tl.where(equal, cost, 0), 0)) - cost
    fits = twice.to(tl.float64) <= 2 * tl.load(budget_ptr + head).to(tl.float64)
    taken = (key > limit) | (equal & fits)
    lonely = tl.sum(taken.to(tl.int32), 0) == 0
    top = tl.min(tl.where(inside & (key == tl.max(key, 0)), column, C_PAD), 0)
    out = taken | (lonely & (column == top)) | first
    tl.store(out_ptr + program * columns + column, out.to(tl.uint8), mask=inside)


def rows(score: Tensor, keep: Tensor, cost: Tensor, budget: float | Tensor) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `fill_rows`."""
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    with torch.cuda.device_of(score):
        grid, args, constants = launch_rows(score, keep, cost, budget, out)
        _rows_kernel[grid](*args, **constants)
    return out


def launch_rows(
    score: Tensor, keep: Tensor, cost: Tensor, budget: float | Tensor, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, h, r, c = score.shape
    score, keep, cost = dense_rows(score), keep.expand(score.shape), dense_rows(cost)
    given = None if isinstance(budget, float) else budget.expand(b, h, r, 1)
    args = (
        score, keep.view(torch.uint8), cost, given, out.view(torch.uint8), *score.stride()[:3], *keep.stride(),
        *_lead(cost), *((0, 0, 0) if given is None else given.stride()[:3]),
        budget if isinstance(budget, float) else 0.0, h, r, c,
    )  # fmt: skip
    return (b * h * r,), args, {"C_PAD": padded_columns(c), "num_warps": warps_for(c)}


def heads(score: Tensor, keep: Tensor, row_cost: Tensor, col_cost: Tensor, share: float) -> Tensor:
    """Run the two kernels on a checked, non-empty call; shapes as in `fill_heads`."""
    b, h, r, _ = score.shape
    device = score.device
    out = torch.empty(score.shape, dtype=torch.bool, device=device)
    found = (
        torch.empty(b, h, dtype=torch.int32, device=device),
        torch.empty(b, h, dtype=torch.float32, device=device),
        torch.empty(b, h, r, dtype=torch.int64, device=device),
    )
    with torch.cuda.device_of(score):
        for kernel, (grid, args, constants) in launch_heads(score, keep, row_cost, col_cost, share, found, out):
            kernel[grid](*args, **constants)
    return out


def launch_heads(
    score: Tensor,
    keep: Tensor,
    row_cost: Tensor,
    col_cost: Tensor,
    share: float,
    found: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
) -> tuple[tuple[Any, tuple[tuple[int], tuple, dict[str, Any]]], ...]:
    """Both kernels, each with its grid, positional arguments and compile-time constants for one call."""
    b, h, r, c = score.shape
    score, keep = dense_rows(score), keep.expand(score.shape)
    row_cost, col_cost = dense_rows(row_cost), dense_rows(col_cost)
    tensors = (score, keep.view(torch.uint8), row_cost, col_cost, *found)
    strides = (*score.stride()[:3], *keep.stride(), *_lead(row_cost), *_lead(col_cost))
    padded = padded_columns(c)
    several = {"ROWS": max(ELEMENTS // padded, 1), "C_PAD": padded, "num_warps": 16}
    one = {"C_PAD": padded, "num_warps": warps_for(c)}
    return (
        (_limit_kernel, ((b * h,), (*tensors, *strides, share, h, r, c), several)),
        (_cut_kernel, ((b * h * r,), (*tensors, out.view(torch.uint8), *strides, h, r, c), one)),
    )


def padded_columns(columns: int) -> int:
    return power_of_two(columns, 16)


def warps_for(columns: int) -> int:
    """About 32 columns a thread: sums over a row that stay in one warp need no barrier."""
    return min(max(padded_columns(columns) // 1024, 1), 8)


def dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _lead(tensor: Tensor) -> tuple[int, int]:
    """Strides over samples and heads, 0 where all are alike."""
    if tensor.dim() == 1:
        return 0, 0
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0
