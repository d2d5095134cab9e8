"""The int8 kernel's keys: rounded, and with the values in slot order, by one pass over them."""

# Triton's language is not Python's: pyright cannot follow constexprs, ranges and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Problem
from .quantised import LEAST_STEP, LEVELS, key_mean, packed_heads
from .triton import _list_strides, _load_rows

SMALLEST = tl.constexpr(LEAST_STEP)
TOP = tl.constexpr(float(LEVELS))


@triton.jit
def to_int8(x, finite, step):
    """The nearest of -127..127 grid steps, halves upwards; `step` must broadcast over x."""
    return tl.floor(tl.where(finite, x, 0.0) * tl.div_rn(1.0, step) + 0.5).to(tl.int8)


@triton.jit
def _pack_kernel(
    k_ptr, v_ptr, mean_ptr, order_ptr, bias_ptr, k_out_ptr, step_ptr, v_out_ptr,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    order_stride_b, order_stride_h, bias_stride_b, bias_stride_h, bias_stride_s,
    length, blocks, heads, heads_per_key_head,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One key block of one head: keys without their mean as int8 with one step, and the values, in slot order.

    `k_out_ptr` int8 and `v_out_ptr` (None where values are read in place) [B, heads, blocks * BLOCK, D_PAD]; what no
    query may see is zero. `step_ptr` fp32 [B, heads, blocks], NaN where a key that may be seen is not finite.
    """
    block = tl.program_id(0)
    h = (tl.program_id(1) % heads).to(tl.int64)
    b = (tl.program_id(1) // heads).to(tl.int64)
    hk = h // heads_per_key_head
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    in_block = row < BLOCK
    slots = block * BLOCK + row
    if order_ptr is not None:
        tok = tl.load(order_ptr + b * order_stride_b + h * order_stride_h + slots, mask=in_block, other=-1)
        ok = tok >= 0
    else:
        tok = slots
        ok = in_block & (slots < length)
    if bias_ptr is not None:
        bias_at = bias_ptr + b * bias_stride_b + h * bias_stride_h + tok.to(tl.int64) * bias_stride_s
        ok &= tl.load(bias_at, mask=ok, other=float("-inf")).to(tl.float32) > float("-inf")

    k = _load_rows(k_ptr + b * k_stride_b + hk * k_stride_h, tok, k_stride_s, k_stride_d, ok, True, D, D_PAD)
    mean = tl.load(mean_ptr + (b * (heads // heads_per_key_head) + hk) * D + d, mask=d < D, other=0.0)
    centred = tl.where(ok[:, None], k.to(tl.float32) - mean[None, :], 0.0)  # [ROWS, D_PAD]
    finite = tl.abs(centred) < float("inf")
    largest = tl.max(tl.max(tl.where(finite, tl.abs(centred), 0.0), 1), 0)
    step = tl.maximum(tl.div_rn(largest, TOP), SMALLEST)
    broken = tl.max(tl.max(tl.where(finite, 0, 1), 1), 0) > 0
    tl.store(step_ptr + (b * heads + h) * blocks + block, tl.where(broken, float("nan"), step))

    at = ((b * heads + h) * blocks * BLOCK + slots)[:, None] * D_PAD + d[None, :]
    tl.store(k_out_ptr + at, to_int8(centred, finite, step), mask=in_block[:, None])
    if v_out_ptr is not None:
        v = _load_rows(v_ptr + b * v_stride_b + hk * v_stride_h, tok, v_stride_s, v_stride_d, ok, True, D, D_PAD)
        tl.store(v_out_ptr + at, v, mask=in_block[:, None])


def padded(problem: Problem) -> int:
    """Columns of the packed rows; products of int8 take 32 numbers at least."""
    return max(32, triton.next_power_of_2(problem.q.shape[3]))


@dataclass(frozen=True)
class Packed:
    """`k` int8 and `v` [B, slots, heads, columns], views of head-major memory; `v` is the call's own where it can be.

    `step` float32 [B, heads, key blocks], `mean` float32 [B, key heads, D].
    """

    k: Tensor
    v: Tensor
    step: Tensor
    mean: Tensor


def pack(problem: Problem) -> Packed:
    """Round the keys, and bring the values into slot order unless they lie so and nothing of them must be hidden."""
    room = packed_room(problem)
    blocks, heads = room.step.shape[2], room.step.shape[1]
    grid = (blocks, problem.q.shape[0] * heads)
    args, constants = pack_launch(problem, room)
    _pack_kernel[grid](*args, **constants)
    return room


def packed_room(problem: Problem) -> Packed:
    """Memory for what `pack` makes, with the mean already in it."""
    k, heads, columns = problem.k, packed_heads(problem), padded(problem)
    slots = -(-k.shape[1] // problem.block_k) * problem.block_k
    if problem.k_order is not None:
        slots = problem.k_order.shape[2]
    shape = (k.shape[0], heads, slots, columns)
    v = problem.v
    if problem.k_order is not None or problem.key_bias is not None:
        v = torch.empty(shape, dtype=v.dtype, device=k.device).transpose(1, 2)
    return Packed(
        torch.empty(shape, dtype=torch.int8, device=k.device).transpose(1, 2),
        v,
        torch.empty(k.shape[0], heads, slots // problem.block_k, dtype=torch.float32, device=k.device),
        key_mean(k),
    )


def pack_launch(problem: Problem, room: Packed) -> tuple[tuple, dict]:
    """Positional arguments and compile-time constants of the packing kernel."""
    k, v, heads = problem.k, problem.v, room.step.shape[1]
    order = None if problem.k_order is None else problem.k_order.contiguous()
    rows = triton.next_power_of_2(problem.block_k)
    args = (
        k, v, room.mean, order, problem.key_bias, room.k, room.step, None if room.v is v else room.v,
        *k.stride(), *v.stride(), *_list_strides(order, 3)[:2], *_list_strides(problem.key_bias, 3),
        k.shape[1], room.step.shape[2], heads, heads // k.shape[2],
    )  # fmt: skip
    constants = {"D": k.shape[3], "D_PAD": padded(problem), "BLOCK": problem.block_k, "ROWS": rows, "num_warps": 8}
    return args, constants
