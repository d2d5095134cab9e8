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
PASSES = 8  # digits of four bits of a limit by head, found one after the other over all rows at once
CHUNK = 256  # rows added up at a time


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
def _head_budget(row_cost_ptr, cost, share, rows, CHUNK: tl.constexpr):
    """A share of what all pairs of a head cost, in whole numbers until the last product."""
    tokens = tl.zeros([CHUNK], tl.int64)
    for first in range(0, rows, CHUNK):
        at = first + tl.arange(0, CHUNK)
        tokens += tl.load(row_cost_ptr + at, mask=at < rows, other=0.0).to(tl.int64)
    return (share * (tl.sum(tokens, 0) * tl.sum(cost.to(tl.int64), 0)).to(tl.float32)).to(tl.float64)


@triton.jit
def _limit(spent_ptr, spent_stride, budget, passes):
    """The leading digits of a head's limit: in each pass the highest at which more than the budget ranks no lower."""
    digit = tl.arange(0, 16)
    limit = tl.full([], -(2**31), tl.int64)
    for done in range(passes):
        over = tl.load(spent_ptr + done * spent_stride + digit).to(tl.float64) > budget
        limit += tl.sum((over & (digit > 0)).to(tl.int64), 0) << (28 - 4 * done)
    return limit.to(tl.int32)


@triton.jit
def _several_rows(
    score_ptr, keep_ptr, row_cost_ptr, first, score_stride_r, keep_stride_r, keep_stride_c, rows, columns,
    ROWS: tl.constexpr, C_PAD: tl.constexpr,
):  # fmt: skip
    """Keys [ROWS, C_PAD] and costs [ROWS] of a few rows; what lies outside ranks below all and costs nothing."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, C_PAD)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    weight = tl.load(row_cost_ptr + row, mask=row < rows, other=0.0).to(tl.int64)
    row = row.to(tl.int64)
    score = tl.load(score_ptr + row[:, None] * score_stride_r + column[None, :], mask=inside, other=0.0)
    keep_at = keep_ptr + row[:, None] * keep_stride_r + column[None, :] * keep_stride_c
    key, _ = _keys(score, tl.load(keep_at, mask=inside, other=0), inside)
    return key, weight


@triton.jit
def _digit_kernel(
    score_ptr, keep_ptr, row_cost_ptr, col_cost_ptr, spent_ptr,
    score_stride_b, score_stride_h, score_stride_r, keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    row_stride_b, row_stride_h, col_stride_b, col_stride_h, share, passes, all_heads, heads, rows, columns,
    ROWS: tl.constexpr, C_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A few rows of a head: what ranks no lower than each next digit of the limit costs, added to the head's sums."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, ROWS)
    first, head = program % blocks * ROWS, program // blocks
    h, b = head % heads, head // heads
    column = tl.arange(0, C_PAD)
    col_at = col_cost_ptr + b * col_stride_b + h * col_stride_h + column
    cost = tl.load(col_at, mask=column < columns, other=0.0).to(tl.int32)
    row_cost_ptr += b * row_stride_b + h * row_stride_h
    spent_ptr += head * 16
    budget = _head_budget(row_cost_ptr, cost, share, rows, CHUNK)
    trial = _limit(spent_ptr, all_heads * 16, budget, passes)
    key, weight = _several_rows(
        score_ptr + b * score_stride_b + h * score_stride_h, keep_ptr + b * keep_stride_b + h * keep_stride_h,
        row_cost_ptr, first, score_stride_r, keep_stride_r, keep_stride_c, rows, columns, ROWS, C_PAD,
    )  # fmt: skip
    step = 1 << (28 - 4 * passes)
    digit = tl.arange(0, 16)
    spent = tl.zeros([16], tl.int64)
    for place in range(1, 16):
        trial += step
        of_rows = tl.sum(tl.where(key >= trial, cost[None, :], 0), 1)
        spent = tl.where(digit == place, tl.sum(of_rows.to(tl.int64) * weight, 0), spent)
    at = spent_ptr + passes * all_heads * 16 + digit
    tl.atomic_add(at, spent, mask=digit > 0, sem="relaxed")  # whole numbers: the same in any order


@triton.jit
def _level_kernel(
    score_ptr, keep_ptr, row_cost_ptr, col_cost_ptr, spent_ptr, level_ptr,
    score_stride_b, score_stride_h, score_stride_r, keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    row_stride_b, row_stride_h, col_stride_b, col_stride_h, share, all_heads, heads, rows, columns,
    ROWS: tl.constexpr, C_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A few rows of a head: what the pairs of each row above the limit cost, and those at it."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, ROWS)
    first, head = program % blocks * ROWS, program // blocks
    h, b = head % heads, head // heads
    column = tl.arange(0, C_PAD)
    col_at = col_cost_ptr + b * col_stride_b + h * col_stride_h + column
    cost = tl.load(col_at, mask=column < columns, other=0.0).to(tl.int32)
    row_cost_ptr += b * row_stride_b + h * row_stride_h
    budget = _head_budget(row_cost_ptr, cost, share, rows, CHUNK)
    limit = _limit(spent_ptr + head * 16, all_heads * 16, budget, 8)
    key, weight = _several_rows(
        score_ptr + b * score_stride_b + h * score_stride_h, keep_ptr + b * keep_stride_b + h * keep_stride_h,
        row_cost_ptr, first, score_stride_r, keep_stride_r, keep_stride_c, rows, columns, ROWS, C_PAD,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    above = tl.sum(tl.where(key > limit, cost[None, :], 0), 1).to(tl.int64) * weight
    equal = tl.sum(tl.where(key == limit, cost[None, :], 0), 1).to(tl.int64) * weight
    at = level_ptr + head * rows + row
    tl.store(at, above, mask=row < rows)
    tl.store(at + all_heads * rows, equal, mask=row < rows)


@triton.jit
def _cut_kernel(
    score_ptr, keep_ptr, row_cost_ptr, col_cost_ptr, spent_ptr, level_ptr, out_ptr,
    score_stride_b, score_stride_h, score_stride_r, keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    row_stride_b, row_stride_h, col_stride_b, col_stride_h, share, all_heads, heads, rows, columns,
    C_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of a head whose limit is known."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program % rows, program // rows
    h, b = head % heads, head // heads
    column = tl.arange(0, C_PAD)
    inside = column < columns
    score_ptr += b * score_stride_b + h * score_stride_h + row * score_stride_r
    keep_ptr += b * keep_stride_b + h * keep_stride_h + row * keep_stride_r
    row_cost_ptr += b * row_stride_b + h * row_stride_h
    score = tl.load(score_ptr + column, mask=inside, other=0.0)
    key, first = _keys(score, tl.load(keep_ptr + column * keep_stride_c, mask=inside, other=0), inside)
    col_at = col_cost_ptr + b * col_stride_b + h * col_stride_h + column
    tokens = tl.load(col_at, mask=inside, other=0.0)
    budget = _head_budget(row_cost_ptr, tokens.to(tl.int32), share, rows, CHUNK)
    limit = _limit(spent_ptr + head * 16, all_heads * 16, budget, 8)
    before = tl.zeros([CHUNK], tl.int64)  # pairs above the limit, and those at it in the rows before this one
    for start in range(0, rows, CHUNK):
        at = start + tl.arange(0, CHUNK)
        before += tl.load(level_ptr + head * rows + at, mask=at < rows, other=0)
        before += tl.load(level_ptr + (all_heads + head) * rows + at, mask=at < row, other=0)
    cost = tl.load(row_cost_ptr + row).to(tl.int64) * tokens.to(tl.int64)
    equal = inside & (key == limit)
    twice = 2 * (tl.sum(before, 0) + tl.cumsum(tl.where(equal, cost, 0), 0)) - cost
    taken = (key > limit) | (equal & (twice.to(tl.float64) <= 2 * budget))
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
    """Run the kernels on a checked, non-empty call; shapes as in `fill_heads`."""
    b, h, r, _ = score.shape
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    found = (
        torch.zeros(PASSES, b * h, 16, dtype=torch.int64, device=score.device),
        torch.empty(2, b * h, r, dtype=torch.int64, device=score.device),
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
    found: tuple[Tensor, Tensor],
    out: Tensor,
) -> list[tuple[Any, tuple[tuple[int], tuple, dict[str, Any]]]]:
    """Return all launches, each with its kernel, grid, positional arguments and compile-time constants for one call."""
    b, h, r, c = score.shape
    score, keep = dense_rows(score), keep.expand(score.shape)
    row_cost, col_cost = dense_rows(row_cost), dense_rows(col_cost)
    spent, level = found
    tensors = (score, keep.view(torch.uint8), row_cost, col_cost, spent)
    strides = (*score.stride()[:3], *keep.stride(), *_lead(row_cost), *_lead(col_cost))
    padded = padded_columns(c)
    several = max(ELEMENTS // padded, 1)
    blocks, sizes = (b * h * -(-r // several),), (b * h, h, r, c)
    tile = {"ROWS": several, "C_PAD": padded, "CHUNK": CHUNK, "num_warps": 8}
    one = {"C_PAD": padded, "CHUNK": CHUNK, "num_warps": warps_for(c)}
    return [
        *((_digit_kernel, (blocks, (*tensors, *strides, share, i, *sizes), tile)) for i in range(PASSES)),
        (_level_kernel, (blocks, (*tensors, level, *strides, share, *sizes), tile)),
        (_cut_kernel, ((b * h * r,), (*tensors, level, out.view(torch.uint8), *strides, share, *sizes), one)),
    ]


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
