"""The block-sparse kernel for compute capability 9.0: which calls it takes, and its launch.

It takes the calls that are most of the work; `triton.py` takes all others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.sizes import power_of_two

from .hopper_kernel import attention_kernel
from .problem import Precision, Problem
from .quantised_pack import pack
from .triton import _can_pack, _fit_tma, _list_strides, _outer_strides, _outputs, _pack

RANKED_PAIRS = 10**10  # a millisecond of attention or more, where a tenth of the pairs are kept
KEYS = (16, 32, 64, 128)  # of a block; a tile holds 128
LINE = 128  # bytes of a row that the copy engine lays side by side
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}


def takes(problem: Problem) -> bool:
    """Whether a checked call on a GPU is for this kernel."""
    return torch.cuda.get_device_capability(problem.q.device) == (9, 0) and not any(_lacks(problem))


def misfits(problem: Problem) -> list[str]:
    """What this kernel lacks for a checked call, whatever the GPU; an empty list when it lacks nothing."""
    q = problem.q
    reasons = (
        f"dtype {q.dtype} is neither bf16 nor fp16",
        f"head dim {q.shape[3]} is not a multiple of 8 within 40..128",
        "the head dim's axis has a stride",
        f"blocks of {problem.block_q} queries are not of 64 or 128",
        f"blocks of {problem.block_k} keys are not of {KEYS}",
        f"in int8 blocks of {problem.block_k} keys are not of 64 or 128",
        "there is a bias",
        "there is a predicate",
        "it is not said which blocks are full",
        "keys may not be packed",
        "keys or values are not aligned",
    )
    return [reason for reason, holds in zip(reasons, _lacks(problem), strict=True) if holds]


def _lacks(problem: Problem) -> tuple[bool, ...]:
    """Which of the reasons of `misfits` hold; sentences are not made at every call."""
    q, packs = problem.q, problem.k_order is not None
    return (
        q.dtype not in (torch.bfloat16, torch.float16),
        q.shape[3] % 8 > 0 or not 32 < q.shape[3] <= 128,
        q.stride(3) != 1,
        problem.block_q not in (64, 128),
        problem.block_k not in KEYS,
        problem.precision == "int8" and problem.block_k < 64,
        problem.key_bias is not None,
        problem.predicate is not None,
        problem.splits and problem.full_count is None,
        packs and not (problem.pack and _can_pack(problem)),
        not packs and not _fit_tma(problem.k, problem.v),
    )


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Run the kernel on a checked, non-empty call that it takes."""
    out, lse = _outputs(problem)
    with torch.cuda.device_of(problem.q):
        grid, args, constants = launch(problem, keys_of(problem), out, lse)
        attention_kernel[grid](*args, **constants)
    return out, lse


class Keys(NamedTuple):
    """Keys and values [B, slots, heads, D] as the copy engine reads them; `step` and `mean` as in `Packed`, in int8."""

    k: Tensor
    v: Tensor
    step: Tensor | None = None
    mean: Tensor | None = None


def keys_of(problem: Problem) -> Keys:
    """In slot order, and rounded where the precision is int8."""
    if problem.precision == "int8":
        packed = pack(problem)
        return Keys(packed.k, packed.v, packed.step, packed.mean)
    if problem.k_order is None:
        return Keys(problem.k, problem.v)
    return Keys(*_pack(problem.k, problem.v, problem.k_order.contiguous()))


def launch(problem: Problem, keys: Keys, out: Tensor, lse: Tensor) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the kernel for one call."""
    q, index = problem.q, problem.index
    batch, q_len, heads, dim = q.shape
    if index.stride(3) != 1:
        index = index.contiguous()
    q_order = None if problem.q_order is None else problem.q_order.contiguous()
    k_order = None if problem.k_order is None else problem.k_order.contiguous()
    full = problem.full_count if problem.splits else None
    q_tiles = index.shape[2]
    tiles = q_tiles * heads * batch
    rank = problem.count.argsort(-1, descending=True) if worth_ranking(problem) else None
    args = (
        q, _descriptor(keys.k, problem.block_k), _descriptor(keys.v, problem.block_k),
        # what is not there is not read, but Gluon's tuples cannot hold None
        *(lse if tensor is None else tensor for tensor in (keys.step, keys.mean)), out, lse, index, problem.count,
        *(index if tensor is None else tensor for tensor in (full, rank, q_order, k_order)),
        torch.zeros(1, dtype=torch.int32, device=q.device),
        *q.stride()[:3], *_list_strides(index)[:3], *_list_strides(problem.count), *_list_strides(full, 3),
        *_list_strides(rank, 3)[:2], *_list_strides(q_order, 3)[:2], *_list_strides(k_order, 3)[:2],
        q_len, problem.k.shape[1], 0 if keys.step is None else keys.step.shape[2], heads, heads // keys.k.shape[2],
        heads // keys.v.shape[2], heads // problem.k.shape[2], q_tiles, tiles, index.shape[3], problem.scale,
    )  # fmt: skip
    padded = power_of_two(dim, 64)
    stages, per_processor = shape_of_program(padded, problem.block_q, problem.precision)
    constants = {
        "D": dim,
        "D_PAD": padded,
        "BLOCK_Q": problem.block_q,
        "BLOCK_K": problem.block_k,
        "SPLIT": problem.splits,
        "RANKED": rank is not None,
        "RAGGED": k_order is None and problem.k.shape[1] % problem.block_k > 0,
        "Q_ORDER": q_order is not None,
        "K_ORDER": k_order is not None,
        "INT8": keys.step is not None,
        "STAGES": stages,
        "num_warps": 4,
    }
    if per_processor == 2:
        constants["maxnreg"] = 128
    return (min(tiles, per_processor * _processors(q.device)),), args, constants


def worth_ranking(problem: Problem) -> bool:
    """Whether a sort is small beside the call: long lists come first then, so that none is begun when others end."""
    batch, q_len, heads, _ = problem.q.shape
    return batch * heads * q_len * problem.k.shape[1] >= RANKED_PAIRS


def shape_of_program(padded_dim: int, block_q: int, precision: Precision) -> tuple[int, int]:
    """How many tiles the ring holds, and how many programs share a multiprocessor."""
    if block_q == 64:
        return (1 if padded_dim == 128 else 2), 2
    if precision == "int8":
        return (3 if padded_dim == 128 else 4), 1
    return (2 if padded_dim == 128 else 4), 1


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    """Read [B, S, H, D] as [B, H, S, D], one chunk of one block of one head at a time; what lies outside is zero."""
    batch, length, heads, dim = tensor.shape
    stride_b, stride_s, stride_h = _outer_strides(tensor)
    box = [1, 1, rows, min(power_of_two(dim, 64), LINE // tensor.element_size())]
    layout = gl.NVMMASharedLayout.get_default_for(box, ELEMENTS[tensor.dtype])
    return TensorDescriptor(tensor, [batch, heads, length, dim], [stride_b, stride_h, stride_s, 1], box, layout)
