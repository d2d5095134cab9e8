"""Block-sparse attention by flash-attn-4 where that package is installed: only if its name is given.

flash-attn-4 (the CuTe kernels of FlashAttention, arXiv 2407.08608 and later) takes lists of whole blocks. What it has
no word for, holes, predicates, biases and ragged ends, is refused with the reason. Queries, keys and values are
gathered into slot order first where there is an order.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .problem import Problem

BLOCK = 128  # of queries and of keys; its other tiles depend on the head dim and the GPU
HEAD_DIMS = (64, 96, 128)


def runs_on(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why flash-attn-4 cannot run on such tensors; an empty list when it can."""
    reasons = []
    if not _installed():
        reasons.append("flash-attn-4 is not installed")
    if device.type != "cuda" or torch.version.hip:
        reasons.append(f"flash-attn-4 does not run on {'ROCm' if device.type == 'cuda' else device.type}")
    elif torch.cuda.get_device_capability(device) < (9, 0):
        reasons.append("flash-attn-4's block-sparse kernels want compute capability 9.0 or more")
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {dtype} is neither fp16 nor bf16")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"head dim {head_dim} is none of {HEAD_DIMS}")
    return reasons


def misfits(problem: Problem) -> list[str]:
    """What flash-attn-4 lacks for a checked call; an empty list when it lacks nothing."""
    orders = (problem.q_order, problem.k_order)
    found = {
        f"blocks of {problem.block_q} x {problem.block_k} are not of {BLOCK} x {BLOCK}": (
            (problem.block_q, problem.block_k) != (BLOCK, BLOCK)
        ),
        "there is a key bias": problem.key_bias is not None,
        "there is a predicate": problem.predicate is not None,
        "some blocks may be partial": problem.splits,
        "a length is no multiple of the blocks": any(
            order is None and x.shape[1] % BLOCK for order, x in zip(orders, (problem.q, problem.k), strict=True)
        ),
        "the query slots are not as many as the queries": (
            problem.q_order is not None and problem.q_order.shape[2] != problem.q.shape[1]
        ),
    }
    return [lack for lack, holds in found.items() if holds]


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attend all query blocks at once; shapes as in `block_sparse_attention`."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]
    from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    heads = problem.q.shape[2]
    q = _in_slots(problem.q, problem.q_order, heads)
    k, v = (_in_slots(x, problem.k_order, heads) for x in (problem.k, problem.v))
    shape = (q.shape[0], heads, problem.index.shape[2])
    count, index = problem.count.expand(shape).contiguous(), problem.index.expand(*shape, -1).contiguous()
    none = torch.zeros_like(count)
    lists = BlockSparseTensorsTorch(none, torch.zeros_like(index), count, index, block_size=(BLOCK, BLOCK))
    out, lse = flash_attn_func(q, k, v, softmax_scale=problem.scale, block_sparse_tensors=lists, return_lse=True)[:2]
    # what it leaves for a row without blocks is not said
    empty = (count == 0).repeat_interleave(BLOCK, 2)
    out = out.contiguous().masked_fill_(empty.transpose(1, 2).unsqueeze(-1), 0)
    lse = lse.masked_fill(empty, float("-inf"))
    if problem.q_order is None:
        return out, lse
    place = problem.q_order.long().expand(q.shape[0], heads, -1)
    rows = place.transpose(1, 2).unsqueeze(-1).expand_as(out)
    return torch.empty_like(out).scatter_(1, rows, out), torch.empty_like(lse).scatter_(2, place, lse)


def _in_slots(x: Tensor, order: Tensor | None, heads: int) -> Tensor:
    """[B, S, H, D] in slot order; one head a query head where heads have orders of their own."""
    if order is None:
        return x
    x = x.repeat_interleave(heads // x.shape[2], 2)
    place = order.long().expand(x.shape[0], heads, -1).transpose(1, 2)
    return x.gather(1, place.unsqueeze(-1).expand(*place.shape, x.shape[3]))


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
