"""Pooled attention in Triton: one pass like any attention, with each query's row of the mask read as it goes."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_mass.triton import vectors_of
from dit_accel.kernels.block_sparse.triton import runs_on
from dit_accel.kernels.sizes import power_of_two

__all__ = ["attend", "runs_on"]

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _pooled_kernel(
    q_ptr, k_ptr, v_ptr, weigh_ptr, allowed_ptr, row_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, weigh_stride_b, weigh_stride_h, allowed_stride_b, allowed_stride_h,
    row_stride_b, row_stride_h, heads, length, groups, columns, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries of one head over all pooled keys."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    asks = query < length
    at = tl.minimum(query, length - 1)
    q = vectors_of(q_ptr + b * q_stride_b + h * q_stride_h, at, q_stride_s, q_stride_d, D, D_PAD)
    row = tl.load(row_ptr + b * row_stride_b + h * row_stride_h + at).to(tl.int32)
    allowed_ptr += b * allowed_stride_b + h * allowed_stride_h
    weigh_ptr += b * weigh_stride_b + h * weigh_stride_h
    k_ptr += bh * groups * D
    v_ptr += bh * groups * D
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D_PAD], tl.float32)
    for first in range(0, groups, TILE_K):
        group = first + tl.arange(0, TILE_K)
        real, place = group < groups, tl.minimum(group, groups - 1)
        seen = tl.load(allowed_ptr + (row[:, None] * columns + group[None, :]), mask=real[None, :], other=0) != 0
        logits = tl.dot(q, vectors_of(k_ptr, place, D, 1, D, D_PAD).T, input_precision=PRECISION) * to_log2
        logits += tl.load(weigh_ptr + group, mask=real, other=float("-inf"))[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a query that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, kept = tl.exp2(logits - shift[:, None]), tl.exp2(top - shift)
        total = total * kept + tl.sum(weights, 1)
        v = vectors_of(v_ptr, place, D, 1, D, D_PAD)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    d = tl.arange(0, D_PAD)
    place = ((b * length + query[:, None]) * heads + h) * D + d[None, :]
    tl.store(out_ptr + place, out, mask=asks[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + bh * length + query, (top + tl.log2(total)) / LOG2_E, mask=asks)


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel on a checked, non-empty call; shapes as in `pooled_attention`."""
    b, s, h, d = q.shape
    out = torch.empty(b, s, h, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, v, tokens, allowed, row, scale, (out, lse))
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
    made: tuple[Tensor, Tensor],
) -> tuple[tuple[int, int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, s, h, dim = q.shape
    exact, padded = q.element_size() == 4, power_of_two(dim, 16)
    rows = 32 if exact else 64 if padded > 128 else 128
    keys, values = (x.to(q.dtype).contiguous() for x in (k, v))
    allowed = torch.nn.functional.pad(allowed, (0, -k.shape[2] % 16))  # so that several are loaded at once
    weigh, allowed, row = (x.contiguous() for x in (tokens.float().log() * LOG2_E.value, allowed, row))
    lead = (n if m > 1 else 0 for x in (weigh, allowed, row) for n, m in zip(x.stride()[:2], x.shape[:2], strict=True))
    args = (
        q, keys, values, weigh, allowed.view(torch.uint8), row, *made, *q.stride(), *lead, h, s, k.shape[2],
        allowed.shape[3], scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim, "D_PAD": padded, "ROWS": rows, "TILE_K": 32 if exact else 64,
        "PRECISION": "ieee" if exact else "tf32", "num_warps": 4 if exact or padded > 128 else 8, "num_stages": 2,
    }  # fmt: skip
    return (-(-s // rows), b * h), args, constants
