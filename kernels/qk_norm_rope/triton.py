"""Norm and rotation in Triton: one program takes one token's queries and keys, all heads, and reads them once."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.rounding import INTERPRETED, rounded
from dit_accel.kernels.sizes import power_of_two

if TYPE_CHECKING:
    from .api import Norm, Part

ELEMENTS = 1024  # of a token's queries for each warp: 32 numbers a thread


def runs_on(device: torch.device) -> list[str]:
    """Why the kernel cannot run on this device; an empty list when it can."""
    if device.type in ("cuda", "meta") or INTERPRETED.value:  # on meta tensors nothing runs
        return []
    return [f"device {device} is not CUDA (set TRITON_INTERPRET=1 before Triton is imported to interpret)"]


@triton.jit
def _members(at, stride, real, D: tl.constexpr, D_PAD: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second channel of each pair, fp32 [ROWS, D_PAD / 2] each, of rows that begin at `at`."""
    HALF: tl.constexpr = D_PAD // 2
    if INTERLEAVED:  # read side by side, for the sake of wide loads
        d = tl.arange(0, D_PAD)[None, :]
        x = tl.load(at + d * stride, mask=real & (d < D), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    else:
        d = tl.arange(0, HALF)[None, :]
        first = tl.load(at + d * stride, mask=real & (d < D // 2), other=0.0).to(tl.float32)
        second = tl.load(at + (d + D // 2) * stride, mask=real & (d < D // 2), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _table(at, stride, real, D: tl.constexpr, D_PAD: tl.constexpr, INTERLEAVED: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """One token's cos or sin for both members of each pair, [1, D_PAD / 2] each."""
    if BY_CHANNEL:
        first, second = _members(at, stride, real, D, D_PAD, INTERLEAVED)
    else:
        d = tl.arange(0, D_PAD // 2)[None, :]
        first = tl.load(at + d * stride, mask=real & (d < D // 2), other=0.0)
        second = first
    return first, second


@triton.jit
def _total(x, ACROSS: tl.constexpr):
    """Sums over the channels of each head [ROWS, 1], or over all heads [1, 1]; as matrices, for sm_100's sake."""
    each = tl.sum(x, 1, keep_dims=True)
    return tl.sum(each, 0, keep_dims=True) if ACROSS else each


@triton.jit
def _one(
    x_ptr, stride_h, stride_d, weight_ptr, bias_ptr, out_ptr, eps, turned, cos_a, cos_b, sin_a, sin_b,
    LAYER: tl.constexpr, ACROSS: tl.constexpr, ROUNDS_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate all heads of one token's queries, or keys."""
    dtype = out_ptr.dtype.element_ty
    HALF: tl.constexpr = D_PAD // 2
    COUNT: tl.constexpr = H * D if ACROSS else D
    h = tl.arange(0, H_PAD)[:, None]
    real = h < H
    a, b = _members(x_ptr + h.to(tl.int64) * stride_h, stride_d, real, D, D_PAD, INTERLEAVED)
    if LAYER:
        mean = _total(a + b, ACROSS) / COUNT
        here = real & (tl.arange(0, HALF)[None, :] < D // 2)
        a, b = tl.where(here, a - mean, 0.0), tl.where(here, b - mean, 0.0)
    scale = tl.rsqrt(_total(a * a + b * b, ACROSS) / COUNT + eps)
    a, b = a * scale, b * scale
    if ROUNDS_FIRST:
        a, b = rounded(a, dtype), rounded(b, dtype)
    rows = h if ACROSS else tl.zeros([1, 1], tl.int32)  # of weights: each head its own, or one for all
    if weight_ptr is not None:
        wa, wb = _members(weight_ptr + rows * D, 1, rows < H, D, D_PAD, INTERLEAVED)
        a, b = a * wa, b * wb
        if ROUNDS_FIRST:
            a, b = rounded(a, dtype), rounded(b, dtype)
    if bias_ptr is not None:
        ca, cb = _members(bias_ptr + rows * D, 1, rows < H, D, D_PAD, INTERLEAVED)
        a, b = a + ca, b + cb
    a, b = rounded(a, dtype), rounded(b, dtype)  # where stock's norm ends
    if TURNS:
        a, b = tl.where(turned, a * cos_a - b * sin_a, a), tl.where(turned, b * cos_b + a * sin_b, b)
        a, b = rounded(a, dtype), rounded(b, dtype)
    if INTERLEAVED:
        d = tl.arange(0, D_PAD)[None, :]
        tl.store(out_ptr + h * D + d, tl.interleave(a, b).to(dtype), mask=real & (d < D))
    else:
        d = tl.arange(0, HALF)[None, :]
        mask = real & (d < D // 2)
        tl.store(out_ptr + h * D + d, a.to(dtype), mask=mask)
        tl.store(out_ptr + h * D + d + D // 2, b.to(dtype), mask=mask)


@triton.jit
def _norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_bias_ptr, k_bias_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    cos_stride_s, cos_stride_d, sin_stride_s, sin_stride_d, length, total, first, start, table, eps,
    LAYER: tl.constexpr, ACROSS: tl.constexpr, ROUNDS_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr,
    BY_CHANNEL: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One token of one part, which goes to its place in the joint sequence."""
    s, b = tl.program_id(0) % length, (tl.program_id(0) // length).to(tl.int64)
    place = first + s
    row = (place - start).to(tl.int64)  # of the tables
    turned = (row >= 0) & (row < table)
    s = s.to(tl.int64)
    cos_a, cos_b, sin_a, sin_b = 0.0, 0.0, 0.0, 0.0
    if cos_ptr is not None:
        rows = row + tl.zeros([1, 1], tl.int64)
        real = (rows >= 0) & (rows < table)
        cos_at, sin_at = cos_ptr + rows * cos_stride_s, sin_ptr + rows * sin_stride_s
        cos_a, cos_b = _table(cos_at, cos_stride_d, real, D, D_PAD, INTERLEAVED, BY_CHANNEL)
        sin_a, sin_b = _table(sin_at, sin_stride_d, real, D, D_PAD, INTERLEAVED, BY_CHANNEL)
    out = (b * total + place) * (H * D)
    _one(
        q_ptr + b * q_stride_b + s * q_stride_s, q_stride_h, q_stride_d, q_weight_ptr, q_bias_ptr, q_out_ptr + out, eps,
        turned, cos_a, cos_b, sin_a, sin_b, LAYER, ACROSS, ROUNDS_FIRST, INTERLEAVED, cos_ptr is not None,
        H, H_PAD, D, D_PAD,
    )  # fmt: skip
    _one(
        k_ptr + b * k_stride_b + s * k_stride_s, k_stride_h, k_stride_d, k_weight_ptr, k_bias_ptr, k_out_ptr + out, eps,
        turned, cos_a, cos_b, sin_a, sin_b, LAYER, ACROSS, ROUNDS_FIRST, INTERLEAVED, cos_ptr is not None,
        H, H_PAD, D, D_PAD,
    )  # fmt: skip


def norm_rope(
    parts: Sequence[Part], norm: Norm, cos: Tensor | None, sin: Tensor | None, start: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Run the kernel on a checked call, a launch a part; arguments as in `qk_norm_rope`."""
    q = parts[0].q
    batch, _, heads, dim = q.shape
    shape = (batch, sum(part.q.shape[1] for part in parts), heads, dim)
    outs = (torch.empty(shape, dtype=q.dtype, device=q.device), torch.empty(shape, dtype=q.dtype, device=q.device))
    first = 0
    with torch.cuda.device_of(q):
        for part in parts:
            if part.q.numel():
                grid, args, constants = launch(part, norm, cos, sin, start, interleaved, outs, first)
                _norm_rope_kernel[grid](*args, **constants)
            first += part.q.shape[1]
    return outs


def launch(
    part: Part,
    norm: Norm,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    interleaved: bool,
    outs: tuple[Tensor, Tensor],
    first: int,
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one part that begins at token `first`."""
    batch, length, heads, dim = part.q.shape
    heads_padded, dim_padded = power_of_two(heads), power_of_two(dim, 16)
    weights = (part.q_weight, part.k_weight, part.q_bias, part.k_bias)
    turns = cos is not None and sin is not None
    args = (
        part.q, part.k, *(None if weight is None else weight.contiguous() for weight in weights), cos, sin, *outs,
        *part.q.stride(), *part.k.stride(), *((*cos.stride(), *sin.stride()) if turns else (0,) * 4),
        length, outs[0].shape[1], first, start, cos.shape[0] if turns else 0, float(norm.eps),
    )  # fmt: skip
    constants = {
        "LAYER": norm.kind == "layer",
        "ACROSS": norm.across_heads,
        "ROUNDS_FIRST": norm.rounds_first,
        "INTERLEAVED": interleaved,
        "BY_CHANNEL": turns and cos.shape[1] == dim,
        "H": heads,
        "H_PAD": heads_padded,
        "D": dim,
        "D_PAD": dim_padded,
        "num_warps": min(max(heads_padded * dim_padded // ELEMENTS, 1), 16),
        "enable_fp_fusion": False,  # a fused product and sum would skip a rounding that stock makes
    }
    return (batch * length,), args, constants
