"""Top-p in Triton: the score at which a row holds its share is found bit by bit, without a sort."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.budget.triton import dense_rows, orderable, padded_columns, runs_on, warps_for

__all__ = ["rows", "runs_on"]

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _mass_kernel(
    score_ptr, keep_ptr, least_ptr, out_ptr, score_stride_b, score_stride_h, score_stride_r,
    keep_stride_b, keep_stride_h, keep_stride_r, keep_stride_c,
    least_stride_b, least_stride_h, least_stride_r, p, least, heads, rows, columns, C_PAD: tl.constexpr,
):  # fmt: skip
    """One row: the largest mass at which what is no smaller holds p and is numerous enough, then who is above it."""
    program = tl.program_id(0).to(tl.int64)
    row, h, b = program % rows, program // rows % heads, program // rows // heads
    column = tl.arange(0, C_PAD)
    inside = column < columns
    score_ptr += b * score_stride_b + h * score_stride_h + row * score_stride_r
    keep_ptr += b * keep_stride_b + h * keep_stride_h + row * keep_stride_r
    score = tl.load(score_ptr + column, mask=inside, other=0.0)
    keep = tl.load(keep_ptr + column * keep_stride_c, mask=inside, other=0)
    finite = tl.abs(score) < float("inf")  # NaN compares false
    mass = tl.where(finite & (score > 0.0), score, 0.0)
    mass = mass / tl.maximum(tl.sum(mass, 0), TINY)
    key = tl.where(inside, orderable(mass), -1)  # from 0 to that of 1.0

    if least_ptr is not None:
        share = tl.load(least_ptr + b * least_stride_b + h * least_stride_h + row * least_stride_r)
        least = (share * columns).to(tl.int32)
    limit = 0
    step = 1 << 29
    for _ in range(30):
        trial = limit + step
        reaches = key >= trial
        enough = (tl.sum(tl.where(reaches, mass, 0.0), 0) >= p) & (tl.sum(reaches.to(tl.int32), 0) >= least)
        limit = tl.where(enough, trial, limit)
        step = step // 2

    above = key > limit
    equal = key == limit  # of equal ones the first are taken
    before = tl.where(equal, mass, 0.0)
    before = tl.sum(tl.where(above, mass, 0.0), 0) + tl.cumsum(before, 0) - before
    rank = tl.sum(above.to(tl.int32), 0) + tl.cumsum(equal.to(tl.int32), 0) - 1
    out = above | (equal & ((before < p) | (rank < least))) | (keep != 0) | ~finite
    tl.store(out_ptr + program * columns + column, out.to(tl.uint8), mask=inside)


def rows(score: Tensor, keep: Tensor, p: float, least: float | Tensor) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `top_mass`."""
    out = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    with torch.cuda.device_of(score):
        grid, args, constants = launch(score, keep, p, least, out)
        _mass_kernel[grid](*args, **constants)
    return out


def launch(
    score: Tensor, keep: Tensor, p: float, least: float | Tensor, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, h, r, c = score.shape
    score, keep = dense_rows(score), keep.expand(score.shape)
    given = least.expand(b, h, r, 1) if isinstance(least, Tensor) else None
    args = (
        score, keep.view(torch.uint8), given, out.view(torch.uint8), *score.stride()[:3], *keep.stride(),
        *((0, 0, 0) if given is None else given.stride()[:3]), float(p),
        0 if isinstance(least, Tensor) else int(least * c), h, r, c,
    )  # fmt: skip
    return (b * h * r,), args, {"C_PAD": padded_columns(c), "num_warps": warps_for(c)}
