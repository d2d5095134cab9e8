"""Pooled attention in Triton: one pass over the groups, no map of queries by groups in memory."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.triton import (
    LOG2_E,
    _capability,
    _dot,
    _list_strides,
    _load_rows,
    _online_softmax,
    runs_on,
)
from dit_accel.kernels.sizes import power_of_two

from .api import WHOLE

__all__ = ["attend", "launch", "packing", "runs_on"]


@dataclass(frozen=True)
class Tile:
    """How one program works: queries by groups of a tile, warps, depth of the load pipeline."""

    queries: int
    groups: int
    warps: int
    stages: int


def choose(capability: tuple[int, int], padded_dim: int, itemsize: int) -> Tile:
    """The tile for one launch: by shared memory and registers, for (9, 0) also the fastest of six on an H200."""
    if itemsize == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return Tile(32, 32 if padded_dim <= 128 else 16, 4 if padded_dim <= 64 else 8, 2)
    if padded_dim > 128 or capability not in ((8, 0), (9, 0), (10, 0)):  # 99 KB of shared memory
        return Tile(64, 64 if padded_dim <= 128 else 32, 4, 2)
    if capability == (9, 0):
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3)


@triton.jit
def _bits_kernel(
    computed_ptr, bits_ptr, stride_b, stride_h, stride_r, stride_c, first, groups, words, heads, rows,
    WORDS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Thirty-two groups of a row into each word, the first group the lowest bit; 1 is not computed, no groups are 0."""
    word = tl.arange(0, WORDS)
    line = tl.program_id(0).to(tl.int64)
    b, h, r = line // (heads * rows), (line // rows) % heads, line % rows
    bit = tl.arange(0, 32)
    group = word[:, None] * 32 + bit[None, :]
    column = (first + group).to(tl.int64)
    at = computed_ptr + b * stride_b + h * stride_h + r * stride_r + (column // 8 if PACKED else column) * stride_c
    done = tl.load(at, mask=group < groups, other=255).to(tl.int32)
    if PACKED:
        done = done >> (column % 8).to(tl.int32)
    tl.store(bits_ptr + line * words + word, tl.sum(((done & 1) ^ 1) << bit[None, :], 1), mask=word < words)


@triton.jit
def _pooled_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, bits_ptr, row_ptr, into_ptr, into_lse_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, bias_stride_b, bias_stride_h,
    bits_stride_b, bits_stride_h, bits_stride_r, row_stride_b, row_stride_h, row_stride_s,
    length, held, groups, heads, tiles, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one head against all groups, each masked by its query's row; everything in log2 units.

    `k_ptr`, `v_ptr` [B, H, held, D_PAD] hold whole tiles, `bits_ptr` two words more than all `groups`; a group that is
    none has bit 0. A byte for each pair instead of a bit costs as much as the products. `into_ptr`, `into_lse_ptr`:
    what attention to other keys came to, from which the sums go on; None: from nothing.
    """
    pid = tl.program_id(0)
    tile, h, b = pid % tiles, ((pid // tiles) % heads).to(tl.int64), ((pid // tiles) // heads).to(tl.int64)
    token = tile * QUERIES + tl.arange(0, QUERIES)
    ok = token < length
    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    q = _load_rows(q_base, token, q_stride_s, q_stride_d, ok, True, D, D_PAD)  # [QUERIES, D_PAD]
    row = tl.load(row_ptr + b * row_stride_b + h * row_stride_h + token * row_stride_s, mask=ok, other=0)
    bits_at = bits_ptr + b * bits_stride_b + h * bits_stride_h + row * bits_stride_r
    bias_ptr += b * bias_stride_b + h * bias_stride_h
    first_group = (b * heads + h) * held * D_PAD
    d, column = tl.arange(0, D_PAD), tl.arange(0, GROUPS)

    line = (b * heads + h) * length + token
    at_out = ((b * length + token) * heads + h)[:, None] * D + d[None, :]
    real = ok[:, None] & (d < D)[None, :]
    if into_ptr is not None:
        top = tl.load(into_lse_ptr + line, mask=ok, other=float("-inf")) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(into_ptr + at_out, mask=real & (total > 0.0)[:, None], other=0.0).to(tl.float32)
    else:
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        acc = tl.zeros([QUERIES, D_PAD], tl.float32)
    low, high = tl.load(bits_at), tl.load(bits_at + 1)
    for first in tl.range(0, groups, GROUPS, num_stages=STAGES):
        if GROUPS > 32:
            word = tl.where(column[None, :] < 32, low[:, None], high[:, None])
        else:
            word = low[:, None]
        seen = (word >> ((column + first % 32) % 32 if GROUPS < 32 else column % 32)[None, :]) & 1  # [QUERIES, GROUPS]
        ahead = bits_at + (first + GROUPS) // 32
        low, high = tl.load(ahead), tl.load(ahead + 1)
        group = first + column
        at = first_group + group[:, None] * D_PAD + d[None, :]
        weigh = tl.load(bias_ptr + group, mask=group < groups, other=0.0) * LOG2_E
        logits = _dot(q, tl.load(k_ptr + at).T, None, PRECISION) * to_log2 + weigh[None, :]
        logits = tl.where(seen != 0, logits, float("-inf"))
        acc, total, top = _online_softmax(logits, tl.load(v_ptr + at), acc, total, top, 1.0, True, PRECISION)

    # a query without a group has total = 0, top = -inf: out 0, lse -inf
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=real)
    tl.store(lse_ptr + line, lse, mask=ok)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    computed: Tensor,
    row: Tensor,
    scale: float,
    first: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernels; shapes as in `pooled_attention`. Mean keys and values are rounded to the queries' dtype."""
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    bits = torch.empty(*computed.shape[:3], words(bias.shape[2]), dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        grid, args, constants = packing(computed, bits, first, bias.shape[2])
        _bits_kernel[grid](*args, **constants)
        grid, args, constants = launch(q, k, v, bias, bits, row, scale, out, lse, into)
        _pooled_kernel[grid](*args, **constants)
    return out, lse


def words(groups: int) -> int:
    """Words of 32 bits that a row of the mask takes: whole tiles, and what the loop loads ahead."""
    return -(-groups // WHOLE) * (WHOLE // 32) + 2


def packing(computed: Tensor, bits: Tensor, first: int, groups: int) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel that packs the mask into `bits`."""
    at_once, packed = power_of_two(bits.shape[3]), computed.dtype == torch.uint8
    args = (
        computed.view(torch.uint8), bits, *_list_strides(computed)[:3], computed.stride(3), first, groups,
        bits.shape[3], *computed.shape[1:3],
    )  # fmt: skip
    constants = {"WORDS": at_once, "PACKED": packed, "num_warps": 4 if at_once > 16 else 1}
    return (computed[..., 0].numel(),), args, constants


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    bits: Tensor,
    row: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    batch, length, heads, dim = q.shape
    padded = power_of_two(dim, 16)
    tile = tile or choose(_capability(q.device), padded, q.element_size())
    k, v = (_ready(x, q.dtype, bias.shape[2], tile.groups, padded) for x in (k, v))
    tiles = -(-length // tile.queries)
    args = (
        q, k, v, bias, bits, row, *((None, None) if into is None else (x.contiguous() for x in into)), out, lse,
        *q.stride(), *_list_strides(bias)[:2], *_list_strides(bits)[:3], *_list_strides(row),
        length, k.shape[2], bias.shape[2], heads, tiles, scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": padded,
        "QUERIES": tile.queries,
        "GROUPS": tile.groups,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (tiles * heads * batch,), args, constants


def _ready(x: Tensor, dtype: torch.dtype, groups: int, whole: int, padded: int) -> Tensor:
    """Means in whole tiles of groups, so that the loop loads without masks; as they are where that is so."""
    batch, heads, held, dim = x.shape
    if x.dtype == dtype and x.is_contiguous() and held % whole == 0 and dim == padded:
        return x
    out = torch.zeros(batch, heads, -(-groups // whole) * whole, padded, dtype=dtype, device=x.device)
    out[:, :, :groups, :dim].copy_(x[:, :, :groups])
    return out
