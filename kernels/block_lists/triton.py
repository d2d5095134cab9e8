"""The lists in Triton: one program per query block and head, which reads its unit's row twice."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import common, power_of_two
from dit_accel.kernels.unit_means.triton import runs_on

__all__ = ["lists", "runs_on"]

COLUMNS = 1024  # key blocks looked at together


@triton.jit
def _blocks(units_ptr, owner_ptr, tokens_ptr, column, width, live, block_k, BITS: tl.constexpr):
    """Which of some key blocks are listed and which are full, as 0 or 1, and their tokens, [COLUMNS] each."""
    inside = column < width
    unit = tl.load(owner_ptr + column, mask=inside, other=0)
    tokens = tl.load(tokens_ptr + column, mask=inside, other=0)
    if BITS:
        byte = tl.load(units_ptr + unit // 8, mask=inside, other=0).to(tl.int32)
        chosen = (byte >> (unit % 8).to(tl.int32)) & 1
    else:
        chosen = tl.load(units_ptr + unit, mask=inside, other=0).to(tl.int32)
    listed = (chosen != 0) & (tokens > 0) & live
    return listed.to(tl.int32), (listed & (tokens == block_k)).to(tl.int32), tokens


@triton.jit
def _lists_kernel(
    units_ptr, q_owner_ptr, k_owner_ptr, q_tokens_ptr, k_tokens_ptr, index_ptr, count_ptr, full_ptr, pairs_ptr,
    units_stride_b, units_stride_h, units_stride_q, q_owner_stride_b, q_owner_stride_h, k_owner_stride_b,
    k_owner_stride_h, q_tokens_stride_b, q_tokens_stride_h, k_tokens_stride_b, k_tokens_stride_h,
    heads, rows, width, block_k, BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The list of one query block of one head: first how many blocks it has, then where each of them goes."""
    program = tl.program_id(0).to(tl.int64)
    row, h, b = program % rows, program // rows % heads, program // rows // heads
    held = tl.load(q_tokens_ptr + b * q_tokens_stride_b + h * q_tokens_stride_h + row)
    own = tl.load(q_owner_ptr + b * q_owner_stride_b + h * q_owner_stride_h + row)
    units_ptr += b * units_stride_b + h * units_stride_h + own * units_stride_q
    k_owner_ptr += b * k_owner_stride_b + h * k_owner_stride_h
    k_tokens_ptr += b * k_tokens_stride_b + h * k_tokens_stride_h
    index_ptr += program * width
    live = held > 0

    counts = tl.zeros([COLUMNS], tl.int32)
    full_counts = tl.zeros([COLUMNS], tl.int32)
    keys = tl.zeros([COLUMNS], tl.int64)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        listed, full, tokens = _blocks(units_ptr, k_owner_ptr, k_tokens_ptr, column, width, live, block_k, BITS)
        counts += listed
        full_counts += full
        keys += listed * tokens
    count = tl.sum(counts, 0)
    full_count = tl.sum(full_counts, 0)
    tl.store(count_ptr + program, count)
    tl.store(full_ptr + program, full_count)
    tl.store(pairs_ptr + program, tl.sum(keys, 0) * held)

    full_seen = 0
    seen = 0
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        listed, full, tokens = _blocks(units_ptr, k_owner_ptr, k_tokens_ptr, column, width, live, block_k, BITS)
        among_full = full_seen + tl.cumsum(full, 0)
        among_all = seen + tl.cumsum(listed, 0)
        place = tl.where(full != 0, among_full, full_count + among_all - among_full) - 1
        tl.store(index_ptr + place, column, mask=listed != 0)
        tl.store(index_ptr + column, 0, mask=(column >= count) & (column < width))
        full_seen += tl.sum(full, 0)
        seen += tl.sum(listed, 0)


def lists(
    units: Tensor, q_owner: Tensor, k_owner: Tensor, q_tokens: Tensor, k_tokens: Tensor, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel on a checked call; shapes as in `block_lists`."""
    b, h = (common(axis, units, q_owner, k_owner) for axis in (0, 1))
    rows, width, device = q_owner.shape[2], k_owner.shape[2], units.device
    index = torch.empty(b, h, rows, width, dtype=torch.int32, device=device)
    count, full_count = (torch.empty(b, h, rows, dtype=torch.int32, device=device) for _ in range(2))
    pairs = torch.empty(b, h, rows, dtype=torch.int64, device=device)
    out = (index, count, full_count, pairs)
    if count.numel():
        with torch.cuda.device_of(units):
            grid, args, constants = launch(units, q_owner, k_owner, q_tokens, k_tokens, block_k, out)
            _lists_kernel[grid](*args, **constants)
    return out


def launch(
    units: Tensor,
    q_owner: Tensor,
    k_owner: Tensor,
    q_tokens: Tensor,
    k_tokens: Tensor,
    block_k: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, h, rows, width = out[0].shape
    bits = units.dtype == torch.uint8
    units = _dense_rows(units)
    sides = [_dense_rows(side) for side in (q_owner, k_owner, q_tokens, k_tokens)]
    args = (
        units if bits else units.view(torch.uint8), *sides, *out, *_strides(units), units.stride(2),
        *(stride for side in sides for stride in _strides(side)), h, rows, width, block_k,
    )  # fmt: skip
    columns = min(COLUMNS, power_of_two(width, 16))
    return (b * h * rows,), args, {"BITS": bits, "COLUMNS": columns, "num_warps": 4 if columns > 256 else 1}


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Strides over samples and heads, 0 where all are alike."""
    batch, heads, *_ = tensor.stride()
    return 0 if tensor.shape[0] == 1 else batch, 0 if tensor.shape[1] == 1 else heads
