"""The largest products in Triton: one pass over the keys, and no map of token pairs in memory."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_mass.triton import logits_of, tile_of
from dit_accel.kernels.sizes import power_of_two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _max_kernel(
    q_ptr, k_ptr, q_slots_ptr, k_slots_ptr, out_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    heads, tiles, units, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of a tile of queries of one head to each key unit; NaN where one of them is."""
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    d = tl.arange(0, D_PAD)
    token = tl.load(q_slots_ptr + tile * TILE_Q + tl.arange(0, TILE_Q))  # [TILE_Q]
    asks = token >= 0
    q_at = q_ptr + b * q_stride_b + h * q_stride_h + token.to(tl.int64)[:, None] * q_stride_s + d[None, :] * q_stride_d
    q = tl.load(q_at, mask=asks[:, None] & (d < D)[None, :], other=0.0)
    if INTERPRETED:  # its matrix product takes bf16 for integers
        q = q.to(tl.float32)
    k_ptr += b * k_stride_b + h * k_stride_h
    out_ptr += ((b * heads + h) * tiles + tile) * units
    best = tl.full([TILE_Q], float("-inf"), tl.float32)
    unsure = tl.zeros([TILE_Q], tl.float32)
    for first in tl.range(0, units * UNIT, TILE_K, num_stages=STAGES):
        logits = logits_of(
            q, k_ptr, k_slots_ptr, None, first, k_stride_s, k_stride_d, scale, D, D_PAD, TILE_K, PRECISION
        )
        best = tl.maximum(best, tl.max(logits, 1))
        unsure = tl.maximum(unsure, tl.max(tl.where(logits == logits, 0.0, 1.0), 1))  # a maximum forgets NaN
        if (first + TILE_K) % UNIT == 0:
            # as rows of matrices: Triton 3.6 fails on sm_100 where a vector of rows is reduced
            top = tl.max(tl.where(asks, best, float("-inf"))[None, :], 1)
            nan = tl.max(tl.where(asks, unsure, 0.0)[None, :], 1)
            tl.store(out_ptr + first // UNIT + tl.arange(0, 1), tl.where(nan > 0, float("nan"), top))
            best = tl.full([TILE_Q], float("-inf"), tl.float32)
            unsure = tl.zeros([TILE_Q], tl.float32)


def largest(q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `block_max`."""
    b, _, h, _ = q.shape
    tile_q, _ = tile_of(unit, q)
    shape = (b, h, len(q_slots) // tile_q, len(k_slots) // unit)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, q_slots, k_slots, unit, scale, out)
        _max_kernel[grid](*args, **constants)
    return out if tile_q == unit else out.unflatten(2, (-1, unit // tile_q)).amax(3)


def launch(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, _, h, dim = q.shape
    tile_q, tile_k = tile_of(unit, q)
    tiles, units = out.shape[2:]
    args = (
        q, k, q_slots.contiguous(), k_slots.contiguous(), out, *q.stride(), *k.stride(), h, tiles, units, scale,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": power_of_two(dim, 16),
        "UNIT": unit,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "STAGES": 2,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }
    return (b * h * tiles,), args, constants
