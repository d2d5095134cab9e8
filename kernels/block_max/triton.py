"""The largest products in Triton: one pass over the keys, and no map of token pairs in memory."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.tiles import power_of_two_part
from dit_accel.kernels.sizes import power_of_two

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def larger(a, b):
    """The larger of two, NaN where one of them is: one instruction."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def vectors_of(x_ptr, token, stride_s, stride_d, D: tl.constexpr, D_PAD: tl.constexpr):
    """The vectors of some tokens, [tokens, D_PAD]; a token -1 gives those of token 0."""
    d = tl.arange(0, D_PAD)
    at = x_ptr + tl.maximum(token, 0).to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    x = tl.load(at) if D == D_PAD else tl.load(at, mask=(d < D)[None, :], other=0.0)
    return x.to(tl.float32) if INTERPRETED else x  # the interpreter's matrix product takes bf16 for integers


@triton.jit
def _max_kernel(
    q_ptr, k_ptr, q_slots_ptr, k_slots_ptr, out_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    heads, tiles, units, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of a tile of queries of one head to each key unit; NaN where one of them is.

    Holes repeat a token of their unit, which changes no maximum, so the loop has one comparison a product and no mask.
    """
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    asking = tl.load(q_slots_ptr + tile * TILE_Q + tl.arange(0, TILE_Q))  # [TILE_Q]
    q = vectors_of(q_ptr + b * q_stride_b + h * q_stride_h, asking, q_stride_s, q_stride_d, D, D_PAD)
    nobody = tl.load(q_slots_ptr + tile * TILE_Q) < 0
    k_ptr += b * k_stride_b + h * k_stride_h
    out_ptr += ((b * heads + h) * tiles + tile) * units
    best = tl.full([TILE_Q], float("-inf"), tl.float32)
    for first in tl.range(0, units * UNIT, TILE_K, num_stages=STAGES):
        token = tl.load(k_slots_ptr + first + tl.arange(0, TILE_K))  # [TILE_K]
        k = vectors_of(k_ptr, token, k_stride_s, k_stride_d, D, D_PAD)
        best = larger(best, tl.reduce(tl.dot(q, k.T, input_precision=PRECISION), 1, larger))
        if (first + TILE_K) % UNIT == 0:
            # as a row of a matrix: Triton 3.6 fails on sm_100 where a vector of rows is reduced
            top = tl.reduce(best[None, :], 1, larger) * scale
            empty = nobody | (tl.load(k_slots_ptr + first) < 0)
            tl.store(out_ptr + first // UNIT + tl.arange(0, 1), tl.where(empty, float("-inf"), top))
            best = tl.full([TILE_Q], float("-inf"), tl.float32)


def largest(q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `block_max`."""
    b, _, h, _ = q.shape
    tile_q, _ = tile_of(unit, q)
    shape = (b, h, len(q_slots) // tile_q, len(k_slots) // unit)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    answers = _repeated(k_slots, unit)
    asks = answers if q_slots is k_slots else _repeated(q_slots, unit)
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, asks, answers, unit, scale, out)
        _max_kernel[grid](*args, **constants)
    return out if tile_q == unit else out.unflatten(2, (-1, unit // tile_q)).amax(3)


def _repeated(slots: Tensor, unit: int) -> Tensor:
    """Put a token of its unit into every hole; -1 stays where a unit has none."""
    by_unit = slots.view(-1, unit)
    return torch.where(by_unit < 0, by_unit.amax(1, keepdim=True), by_unit).flatten()


def launch(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, out: Tensor
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call of slots without holes."""
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
        "STAGES": 3,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 8 if tile_k == 128 else 4,
        "num_stages": 3,
    }
    return (b * h * tiles,), args, constants


def tile_of(unit: int, q: Tensor) -> tuple[int, int]:
    """Rows of queries and keys looked at together, both parts of a unit: as many as registers hold, not yet timed."""
    part, padded = power_of_two_part(unit), power_of_two(q.shape[3], 16)
    if q.element_size() == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return min(part, 32), min(part, 32)
    return min(part, 64 if padded > 128 else 128), min(part, 128 if padded <= 64 else 64 if padded <= 128 else 32)
