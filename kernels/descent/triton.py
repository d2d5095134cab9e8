"""The descent in Triton: every product once on tensor cores, then a search that only reads.

A descent meets twelve of a unit's 64 keys, but no two groups the same ones: to gather those keys moves a hundred times
the bytes of the largest products of a group with all keys, which are a plain matrix product with a maximum behind it.
"""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_mass.triton import vectors_of
from dit_accel.kernels.block_max.triton import larger
from dit_accel.kernels.block_sparse.triton import runs_on
from dit_accel.kernels.sizes import power_of_two

__all__ = ["best", "runs_on"]

BYTES = 256 << 20  # of largest products held at once
ROWS = 128  # queries of a program
UNITS = 256  # searched by a program


@triton.jit
def _largest_kernel(
    q_ptr, k_ptr, slots_ptr, out_ptr, k_stride_b, k_stride_s, k_stride_h, k_stride_d, q_stride_bh, heads, groups, slots,
    D: tl.constexpr, D_PAD: tl.constexpr, ASKING: tl.constexpr, GROUPS: tl.constexpr, TILE_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some groups of queries of one head: the largest product of each group with every key.

    Queries are the columns of the product, so that most of a group lies in one thread.
    """
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    row = tile * GROUPS * ASKING + tl.arange(0, GROUPS * ASKING)
    q = vectors_of(q_ptr + bh * q_stride_bh, tl.minimum(row, groups * ASKING - 1), D, 1, D, D_PAD).T
    k_ptr += bh // heads * k_stride_b + bh % heads * k_stride_h
    out_ptr += bh * groups * slots
    for first in tl.range(0, slots, TILE_K, num_stages=STAGES):
        slot = first + tl.arange(0, TILE_K)
        token = tl.load(slots_ptr + slot, mask=slot < slots, other=0)
        products = tl.dot(vectors_of(k_ptr, token, k_stride_s, k_stride_d, D, D_PAD), q, input_precision=PRECISION)
        most = tl.reduce(tl.reshape(products, [TILE_K, GROUPS, ASKING]), 2, larger)  # [TILE_K, GROUPS]
        at = group[None, :].to(tl.int64) * slots + slot[:, None]
        tl.store(out_ptr + at, most, mask=(slot < slots)[:, None] & (group < groups)[None, :])


@triton.jit
def _search_kernel(
    most_ptr, tokens_ptr, out_ptr, units, out_stride, offset, groups, UNIT: tl.constexpr, LEVELS: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """One group of queries and some units of keys, a unit a lane."""
    program = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    real = unit < units
    most_ptr += program * units * UNIT + unit * UNIT
    low = tl.zeros([UNITS], tl.int32)
    high = tl.load(tokens_ptr + unit, mask=real, other=1)
    best = tl.full([UNITS], float("-inf"), tl.float32)
    for _ in tl.static_range(LEVELS):
        middle = (low + high) // 2
        left = tl.load(most_ptr + (low + middle) // 2, mask=real, other=0.0)
        right = tl.load(most_ptr + (middle + high) // 2, mask=real, other=0.0)
        best = larger(best, larger(left, right))
        goes_left = left > right
        low, high = tl.where(goes_left, low, middle), tl.where(goes_left, middle, high)
    out_ptr += program // groups * out_stride + (offset + program % groups) * units
    tl.store(out_ptr + unit, best, mask=real)


def best(queries: Tensor, k: Tensor, slots: Tensor, unit: int) -> Tensor:
    """Run the kernels on a checked, non-empty call; shapes as in `descend`."""
    b, h, groups, _, _ = queries.shape
    out = torch.empty(b, h, groups, len(slots) // unit, dtype=torch.float32, device=k.device)
    tokens = (slots >= 0).view(-1, unit).sum(-1, dtype=torch.int32)
    queries, done = _whole_groups(queries), 0
    with torch.cuda.device_of(k):
        for part in queries.split(max(1, BYTES // (4 * b * h * len(slots))), 2):
            most = torch.empty(b, h, part.shape[2], len(slots), dtype=torch.float32, device=k.device)
            for kernel, (grid, args, constants) in launches(part, k, slots, tokens, unit, most, out, done):
                kernel[grid](*args, **constants)
            done += part.shape[2]
    return out


def _whole_groups(queries: Tensor) -> Tensor:
    """Repeat each group's first query until a power of two ask, which changes no maximum."""
    more = power_of_two(queries.shape[3]) - queries.shape[3]
    return torch.cat([queries, queries[:, :, :, :1].expand(-1, -1, -1, more, -1)], 3) if more else queries


def launches(
    queries: Tensor, k: Tensor, slots: Tensor, tokens: Tensor, unit: int, most: Tensor, out: Tensor, done: int
) -> list[tuple[Any, tuple[tuple[int, ...], tuple, dict[str, Any]]]]:
    """Both kernels in order, with grid, arguments and constants, for the groups from `done` on, whole ones."""
    b, h, groups, asking, dim = queries.shape
    queries, slots = queries.contiguous(), slots.clamp(min=0)  # nobody searches in holes
    padded, exact = power_of_two(dim, 16), k.element_size() == 4
    at_once = max(1, (32 if exact else 64 if padded > 128 else ROWS) // asking)
    constants = {
        "D": dim, "D_PAD": padded, "ASKING": asking, "GROUPS": at_once, "TILE_K": 32 if exact else 64, "STAGES": 3,
        "PRECISION": "ieee" if exact else "tf32", "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    args = (queries, k, slots, most, *k.stride(), groups * asking * dim, h, groups, len(slots))
    first = (_largest_kernel, ((-(-groups // at_once), b * h), args, constants))
    units = len(tokens)
    search = {"UNIT": unit, "LEVELS": (unit - 1).bit_length(), "UNITS": UNITS, "num_warps": 4}
    args = (most, tokens, out, units, out.shape[2] * units, done, groups)
    return [first, (_search_kernel, ((b * h * groups, -(-units // UNITS)), args, search))]
