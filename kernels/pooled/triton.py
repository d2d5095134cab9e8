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

__all__ = ["attend", "launch", "runs_on"]


@dataclass(frozen=True)
class Tile:
    """How one program works: queries by groups of a tile, warps, depth of the load pipeline."""

    queries: int
    groups: int
    warps: int
    stages: int


def choose(capability: tuple[int, int], padded_dim: int, itemsize: int) -> Tile:
    """The tile for one launch: by shared memory and registers, not yet by measurement."""
    if itemsize == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return Tile(32, 32 if padded_dim <= 128 else 16, 4 if padded_dim <= 64 else 8, 2)
    if padded_dim > 128 or capability not in ((8, 0), (9, 0), (10, 0)):  # 99 KB of shared memory
        return Tile(64, 64 if padded_dim <= 128 else 32, 4, 2)
    return Tile(128, 64, 8, 2)  # four warps have no registers left for the mask


@triton.jit
def _pooled_kernel(
    q_ptr, k_ptr, v_ptr, weigh_ptr, allowed_ptr, row_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, weigh_stride_b, weigh_stride_h,
    allowed_stride_b, allowed_stride_h, allowed_stride_r, row_stride_b, row_stride_h, row_stride_s,
    length, groups, heads, tiles, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one head against all groups, each masked by its query's row; everything in log2 units.

    `k_ptr`, `v_ptr` [B, H, groups, D_PAD] and `allowed_ptr` hold whole tiles; a group that is none is never allowed,
    one without tokens weighs -inf.
    """
    pid = tl.program_id(0)
    tile, h, b = pid % tiles, ((pid // tiles) % heads).to(tl.int64), ((pid // tiles) // heads).to(tl.int64)
    token = tile * QUERIES + tl.arange(0, QUERIES)
    ok = token < length
    q_base = q_ptr + b * q_stride_b + h * q_stride_h
    q = _load_rows(q_base, token, q_stride_s, q_stride_d, ok, True, D, D_PAD)  # [QUERIES, D_PAD]
    row = tl.load(row_ptr + b * row_stride_b + h * row_stride_h + token * row_stride_s, mask=ok, other=0)
    allowed_at = allowed_ptr + b * allowed_stride_b + h * allowed_stride_h + row[:, None] * allowed_stride_r
    weigh_ptr += b * weigh_stride_b + h * weigh_stride_h
    first_group = (b * heads + h) * groups * D_PAD
    d, column = tl.arange(0, D_PAD), tl.arange(0, GROUPS)

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D_PAD], tl.float32)
    for first in tl.range(0, groups, GROUPS, num_stages=STAGES):
        group = first + column
        at = first_group + group[:, None] * D_PAD + d[None, :]
        logits = _dot(q, tl.load(k_ptr + at).T, None, PRECISION) * to_log2 + tl.load(weigh_ptr + group)[None, :]
        seen = tl.load(allowed_at + group[None, :]) != 0  # [QUERIES, GROUPS]
        logits = tl.where(seen, logits, float("-inf"))
        acc, total, top = _online_softmax(logits, tl.load(v_ptr + at), acc, total, top, 1.0, True, PRECISION)

    # a query without a group has total = 0, top = -inf: out 0, lse -inf
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453
    out_at = out_ptr + ((b * length + token) * heads + h)[:, None] * D + d[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + (b * heads + h) * length + token, lse, mask=ok)


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel; shapes as in `pooled_attention`. Mean keys and values are rounded to the queries' dtype."""
    batch, length, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, v, tokens, allowed, row, scale, out, lse)
        _pooled_kernel[grid](*args, **constants)
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    allowed: Tensor,
    row: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    tile: Tile | None = None,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    batch, length, heads, dim = q.shape
    padded = power_of_two(dim, 16)
    tile = tile or choose(_capability(q.device), padded, q.element_size())
    # whole tiles of groups, so that the loop loads without masks
    groups = k.shape[2]
    more = -groups % tile.groups
    both = torch.zeros(2, batch, heads, groups + more, padded, dtype=q.dtype, device=q.device)
    for whole, x in zip(both, (k, v), strict=True):
        whole[:, :, :groups, :dim].copy_(x)
    weigh = torch.nn.functional.pad(tokens.float().log2(), (0, more))  # of no tokens -inf
    allowed = torch.nn.functional.pad(allowed, (0, more)).view(torch.uint8)
    tiles = -(-length // tile.queries)
    args = (
        q, *both, weigh, allowed, row, out, lse,
        *q.stride(), *_list_strides(weigh)[:2], *_list_strides(allowed)[:3], *_list_strides(row),
        length, groups + more, heads, tiles, scale * LOG2_E.value,
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
