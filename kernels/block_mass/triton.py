"""The mass in Triton: two passes over the keys, and no map of token pairs in memory."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.block_sparse.tiles import power_of_two_part
from dit_accel.kernels.block_sparse.triton import runs_on
from dit_accel.kernels.sizes import power_of_two

__all__ = ["logits_of", "mass", "runs_on", "tile_of"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def logits_of(
    q, k_ptr, slots_ptr, bias_ptr, first, stride_s, stride_d, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logits of a tile of queries to a tile of keys, [TILE_Q, TILE_K], a bias in log2 units; a hole has -inf."""
    d = tl.arange(0, D_PAD)
    token = tl.load(slots_ptr + first + tl.arange(0, TILE_K))  # [TILE_K]
    real = token >= 0
    k_at = k_ptr + token.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    k = tl.load(k_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    if INTERPRETED:  # its matrix product takes bf16 for integers
        k = k.to(tl.float32)
    logits = tl.dot(q, k.T, input_precision=PRECISION) * scale
    if bias_ptr is not None:
        logits += (tl.load(bias_ptr + token, mask=real, other=0.0).to(tl.float32) * LOG2_E)[None, :]
    return tl.where(real[None, :], logits, float("-inf"))


@triton.jit
def _lse(
    q, k_ptr, slots_ptr, bias_ptr, slots, stride_s, stride_d, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp over all keys of a tile of queries, in log2 units [TILE_Q]; NaN without a key."""
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    for first in tl.range(0, slots, TILE_K, num_stages=STAGES):
        logits = logits_of(
            q, k_ptr, slots_ptr, bias_ptr, first, stride_s, stride_d, to_log2, D, D_PAD, TILE_K, PRECISION
        )
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        top = new_top
    return top + tl.log2(total)


@triton.jit
def _mass_kernel(
    q_ptr, k_ptr, q_slots_ptr, k_slots_ptr, bias_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    bias_stride_b, bias_stride_h, heads, tiles, units, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    GIVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of queries of one head gives to each key unit, added up over the queries.

        p_ij = exp2(s_ij - lse_i),  lse_i = log2 sum_j exp2(s_ij),  out_u = sum_i sum_(j in u) p_ij

    with s = log2(e) (scale q·k + bias): the first pass finds lse, unless it is given, the second adds up.
    """
    tile, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles % heads).to(tl.int64)
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    d = tl.arange(0, D_PAD)
    token = tl.load(q_slots_ptr + tile * TILE_Q + tl.arange(0, TILE_Q))  # [TILE_Q]
    asks = token >= 0
    q_at = q_ptr + b * q_stride_b + h * q_stride_h + token.to(tl.int64)[:, None] * q_stride_s + d[None, :] * q_stride_d
    q = tl.load(q_at, mask=asks[:, None] & (d < D)[None, :], other=0.0)
    if INTERPRETED:
        q = q.to(tl.float32)
    k_ptr += b * k_stride_b + h * k_stride_h
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * bias_stride_h

    lse_ptr += (b * heads + h) * tiles * TILE_Q + tile * TILE_Q + tl.arange(0, TILE_Q)
    if GIVEN:
        lse = tl.load(lse_ptr) * LOG2_E
    else:
        lse = _lse(
            q, k_ptr, k_slots_ptr, bias_ptr, units * UNIT, k_stride_s, k_stride_d, to_log2,
            D, D_PAD, TILE_Q, TILE_K, STAGES, PRECISION,
        )  # fmt: skip
        tl.store(lse_ptr, lse / LOG2_E)

    out_ptr += ((b * heads + h) * tiles + tile) * units
    mass = tl.zeros([TILE_Q], tl.float32)
    for first in tl.range(0, units * UNIT, TILE_K, num_stages=STAGES):
        logits = logits_of(
            q, k_ptr, k_slots_ptr, bias_ptr, first, k_stride_s, k_stride_d, to_log2, D, D_PAD, TILE_K, PRECISION
        )
        mass += tl.sum(tl.exp2(logits - lse[:, None]), 1)
        if (first + TILE_K) % UNIT == 0:
            # as a row of a matrix: Triton 3.6 fails on sm_100 where a vector of rows is added up
            whole = tl.sum(tl.where(asks, mass, 0.0)[None, :], 1)
            tl.store(out_ptr + first // UNIT + tl.arange(0, 1), whole)
            mass = tl.zeros([TILE_Q], tl.float32)


def mass(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, key_bias: Tensor | None
) -> Tensor:
    """Run the kernel on a checked, non-empty call; shapes as in `block_mass`."""
    return mass_and_lse(q, k, q_slots, k_slots, unit, scale, key_bias, None)[0]


def mass_and_lse(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    key_bias: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel on a checked, non-empty call; shapes as in `block_mass_and_lse`."""
    b, _, h, _ = q.shape
    tile_q, _ = tile_of(unit, q)
    q_units, k_units = len(q_slots) // unit, len(k_slots) // unit
    out = torch.empty(b, h, len(q_slots) // tile_q, k_units, dtype=torch.float32, device=q.device)
    found = torch.empty(b, h, len(q_slots), dtype=torch.float32, device=q.device) if lse is None else lse.contiguous()
    with torch.cuda.device_of(q):
        grid, args, constants = launch(q, k, q_slots, k_slots, unit, scale, key_bias, out, found, lse is not None)
        _mass_kernel[grid](*args, **constants)
    tokens = (q_slots >= 0).view(q_units, unit).sum(-1).clamp(min=1)
    return out.unflatten(2, (q_units, -1)).sum(3) / tokens[:, None], found


def launch(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    given: bool,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    b, _, h, dim = q.shape
    tile_q, tile_k = tile_of(unit, q)
    tiles, units = out.shape[2:]
    bias = None if key_bias is None else key_bias.contiguous()
    lead = (
        (0, 0)
        if bias is None
        else tuple(s if n > 1 else 0 for s, n in zip(bias.stride()[:2], bias.shape[:2], strict=True))
    )
    args = (
        q, k, q_slots.contiguous(), k_slots.contiguous(), bias, out, lse, *q.stride(), *k.stride(), *lead,
        h, tiles, units, scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": power_of_two(dim, 16),
        "UNIT": unit,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "GIVEN": given,
        "STAGES": 2,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }
    return (b * h * tiles,), args, constants


def tile_of(unit: int, q: Tensor) -> tuple[int, int]:
    """Rows of queries and keys looked at together, both parts of a unit: by shared memory, not yet by measurement."""
    part, wide = power_of_two_part(unit), power_of_two(q.shape[3], 16) > 128
    if q.element_size() == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return min(part, 32), min(part, 32)
    return min(part, 64 if wide else 128), min(part, 32 if wide else 64)
