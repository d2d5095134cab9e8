"""The largest products in Triton: one pass over the keys, and no map of token pairs in memory."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_mass.triton import vectors_of
from dit_accel.kernels.block_sparse.tiles import power_of_two_part
from dit_accel.kernels.holes import repeated
from dit_accel.kernels.sizes import power_of_two


@triton.jit
def larger(a, b):
    """The larger of two, NaN where one of them is: one instruction."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max_kernel(
    q_ptr, k_ptr, q_slots_ptr, k_slots_ptr, q_bias_ptr, k_bias_ptr, out_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    heads, tiles, units, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of a tile of queries of one head to each key unit; NaN where one of them is. Biases by slot.

    Holes repeat a token of their unit, which changes no maximum, so the loop has one comparison a product and no mask.
    """
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    asking = tl.load(q_slots_ptr + tile * TILE_Q + tl.arange(0, TILE_Q))  # [TILE_Q]
    q = vectors_of(q_ptr + b * q_stride_b + h * q_stride_h, asking, q_stride_s, q_stride_d, D, D_PAD)
    if q_bias_ptr is not None:
        own = tl.load(q_bias_ptr + ((b * heads + h) * tiles + tile) * TILE_Q + tl.arange(0, TILE_Q))
        k_bias_ptr += (b * heads + h) * units * UNIT
    k_ptr += b * k_stride_b + h * k_stride_h
    out_ptr += ((b * heads + h) * tiles + tile) * units
    best = tl.full([TILE_Q], float("-inf"), tl.float32)
    for first in tl.range(0, units * UNIT, TILE_K, num_stages=STAGES):
        slot = first + tl.arange(0, TILE_K)
        k = vectors_of(k_ptr, tl.load(k_slots_ptr + slot), k_stride_s, k_stride_d, D, D_PAD)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        if q_bias_ptr is not None:
            logits = logits * scale + tl.load(k_bias_ptr + slot)[None, :]
        best = larger(best, tl.reduce(logits, 1, larger))
        if (first + TILE_K) % UNIT == 0:
            # as a row of a matrix: Triton 3.6 fails on sm_100 where a vector of rows is reduced
            best = best + own if q_bias_ptr is not None else best * scale
            tl.store(out_ptr + first // UNIT + tl.arange(0, 1), tl.reduce(best[None, :], 1, larger))
            best = tl.full([TILE_Q], float("-inf"), tl.float32)


def largest(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    biases: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `block_max`."""
    b, _, h, _ = q.shape
    tile_q, _ = tile_of(unit, q)
    shape = (b, h, len(q_slots) // tile_q, len(k_slots) // unit)
    out = torch.empty(shape, dtype=torch.float32, device=q.device)
    asks, answers = (repeated(slots, unit) for slots in (q_slots, k_slots))
    if biases is not None:
        biases = biases[0][:, :, asks], biases[1][:, :, answers]
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, asks, answers, unit, scale, biases, out)
        _max_kernel[grid](*args, **constants)
    best = out if tile_q == unit else out.unflatten(2, (-1, unit // tile_q)).amax(3)
    empty_q, empty_k = ((slots < 0).view(-1, unit).all(1) for slots in (q_slots, k_slots))
    return best.masked_fill_(empty_q[:, None] | empty_k, float("-inf"))


def launch(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    biases: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, arguments and constants of the kernel for one call of slots without holes and biases by slot."""
    b, _, h, dim = q.shape
    tile_q, tile_k = tile_of(unit, q)
    tiles, units = out.shape[2:]
    args = (
        q, k, q_slots.contiguous(), k_slots.contiguous(), *(x.contiguous() for x in biases or ()),
        *((None, None) if biases is None else ()), out, *q.stride(), *k.stride(), h, tiles, units, scale,
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
