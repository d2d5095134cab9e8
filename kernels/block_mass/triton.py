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
from dit_accel.kernels.holes import by_slot, repeated
from dit_accel.kernels.sizes import power_of_two

__all__ = ["mass", "runs_on", "tile_of", "vectors_of"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def vectors_of(x_ptr, token, stride_s, stride_d, D: tl.constexpr, D_PAD: tl.constexpr):
    """The vectors of some tokens, [tokens, D_PAD]."""
    d = tl.arange(0, D_PAD)
    at = x_ptr + token.to(tl.int64)[:, None] * stride_s + d[None, :] * stride_d
    x = tl.load(at) if D == D_PAD else tl.load(at, mask=(d < D)[None, :], other=0.0)
    return x.to(tl.float32) if INTERPRETED else x  # the interpreter's matrix product takes bf16 for integers


@triton.jit
def _products(
    q, k_ptr, slots_ptr, more_ptr, first, stride_s, stride_d,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of a tile of queries and a tile of keys, [TILE_Q, TILE_K], and what each slot adds to its logits.

    Holes repeat a token and add -inf: an addition a pair, where a mask would cost more and hold up the loads.
    """
    slot = first + tl.arange(0, TILE_K)
    k = vectors_of(k_ptr, tl.load(slots_ptr + slot), stride_s, stride_d, D, D_PAD)
    return tl.dot(q, k.T, input_precision=PRECISION), tl.load(more_ptr + slot)


@triton.jit
def _lse(
    q, k_ptr, slots_ptr, more_ptr, slots, stride_s, stride_d, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp over all keys of a tile of queries, in log2 units [TILE_Q]; NaN without a key."""
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    for first in tl.range(0, slots, TILE_K, num_stages=STAGES):
        products, more = _products(
            q, k_ptr, slots_ptr, more_ptr, first, stride_s, stride_d, D, D_PAD, TILE_K, PRECISION
        )
        logits = products * to_log2 + more[None, :]
        new_top = tl.maximum(top, tl.max(logits, 1))
        # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        top = new_top
    return top + tl.log2(total)


@triton.jit
def _mass_kernel(
    q_ptr, k_ptr, q_slots_ptr, k_slots_ptr, more_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    more_stride_b, more_stride_h, heads, tiles, units, to_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, UNIT: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    GIVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of queries of one head gives to each key unit, added up over the queries.

        p_ij = exp2(s_ij - lse_i),  lse_i = log2 sum_j exp2(s_ij),  out_u = sum_i sum_(j in u) p_ij

    with s = log2(e) (scale q·k + bias), its second part in `more`: the first pass finds lse, unless it is given, the
    second adds up.
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
    more_ptr += b * more_stride_b + h * more_stride_h

    lse_ptr += (b * heads + h) * tiles * TILE_Q + tile * TILE_Q + tl.arange(0, TILE_Q)
    if GIVEN:
        lse = tl.load(lse_ptr) * LOG2_E
    else:
        lse = _lse(
            q, k_ptr, k_slots_ptr, more_ptr, units * UNIT, k_stride_s, k_stride_d, to_log2,
            D, D_PAD, TILE_Q, TILE_K, STAGES, PRECISION,
        )  # fmt: skip
        tl.store(lse_ptr, lse / LOG2_E)

    out_ptr += ((b * heads + h) * tiles + tile) * units
    mass = tl.zeros([TILE_Q], tl.float32)
    for first in tl.range(0, units * UNIT, TILE_K, num_stages=STAGES):
        products, more = _products(
            q, k_ptr, k_slots_ptr, more_ptr, first, k_stride_s, k_stride_d, D, D_PAD, TILE_K, PRECISION
        )
        mass += tl.sum(tl.exp2(products * to_log2 - lse[:, None] + more[None, :]), 1)
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
    bias = torch.zeros(1, 1, k.shape[1], device=k.device) if key_bias is None else key_bias
    more = by_slot(bias, k_slots) * LOG2_E.value
    with torch.cuda.device_of(q):
        at = repeated(k_slots, unit)
        grid, args, constants = launch(q, k, q_slots, at, unit, scale, more, out, found, lse is not None)
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
    more: Tensor,
    out: Tensor,
    lse: Tensor,
    given: bool,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, arguments and constants of the kernel for one call of key slots without holes and `more` by slot."""
    b, _, h, dim = q.shape
    tile_q, tile_k = tile_of(unit, q)
    tiles, units = out.shape[2:]
    more = more.contiguous()
    lead = (s if n > 1 else 0 for s, n in zip(more.stride()[:2], more.shape[:2], strict=True))
    args = (
        q, k, q_slots.contiguous(), k_slots.contiguous(), more, out, lse, *q.stride(), *k.stride(), *lead,
        h, tiles, units, scale * LOG2_E.value,
    )  # fmt: skip
    constants = {
        "D": dim,
        "D_PAD": power_of_two(dim, 16),
        "UNIT": unit,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "GIVEN": given,
        "STAGES": 3,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 3,
    }
    return (b * h * tiles,), args, constants


def tile_of(unit: int, q: Tensor) -> tuple[int, int]:
    """Rows of queries and keys looked at together, both parts of a unit: by shared memory, not yet by measurement."""
    part, wide = power_of_two_part(unit), power_of_two(q.shape[3], 16) > 128
    if q.element_size() == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return min(part, 32), min(part, 32)
    return min(part, 64 if wide else 128), min(part, 32 if wide else 64)
