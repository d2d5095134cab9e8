"""Block-sparse attention by torch's FlexAttention, for accelerators that our own kernels do not run on.

Queries, keys and values are gathered into slot order, our lists become a BlockMask, holes and predicate its mask, a key
bias its score change. FlexAttention (Dong et al. 2024, arXiv 2412.05496) multiplies whole blocks, so a NaN in a value
reaches all queries of the blocks that list it, also those that may not see it. On a CPU, where it runs uncompiled and
without looking at the lists, it reaches every query: that is for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .problem import Problem
from .reference import Rows, block_tokens, within

DEVICES = ("cpu", "cuda", "xpu", "hpu")
PASSED, PARTIAL, FULL = 0, 1, 2  # what a query block does with a key block


def runs_on(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why FlexAttention cannot run on such tensors; an empty list when it can."""
    reasons = []
    if device.type not in DEVICES:
        reasons.append(f"FlexAttention does not run on {device.type}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {dtype} is not fp16, bf16 or fp32")
    return reasons


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attend all query blocks at once; shapes as in `block_sparse_attention`."""
    q, k, heads = problem.q, problem.k, problem.q.shape[2]
    q_tokens = _tokens(problem.q_order, problem.block_q, q, heads)
    k_tokens = _tokens(problem.k_order, problem.block_k, k, heads)
    listed = _listed(problem, k_tokens.shape[2])
    unseen = (_hidden(problem, k_tokens) | ~_in_some_list(listed, problem, k_tokens)).unsqueeze(-1)
    queries = Rows(q, heads, q.dtype).take(q_tokens)
    keys, values = (Rows(x, heads, x.dtype).take(k_tokens).masked_fill(unseen, 0) for x in (k, problem.v))
    mask, bias = _block_mask(problem, q_tokens, k_tokens, listed), _add_bias(problem, k_tokens)
    run, options = (flex_attention, None) if q.device.type == "cpu" else (_compiled(), _tiles(problem))
    aux = AuxRequest(lse=True)
    out, more = run(queries, keys, values, bias, mask, problem.scale, kernel_options=options, return_aux=aux)
    return _scattered(problem, q_tokens, out, more.lse.float())


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def _tiles(problem: Problem) -> dict[str, int]:
    """Tiles that divide the blocks of the lists, which FlexAttention asks for."""
    rows, columns = (min(64, block & -block) for block in (problem.block_q, problem.block_k))
    return {"BLOCK_M": rows, "BLOCK_N": columns}


def _tokens(order: Tensor | None, block: int, x: Tensor, heads: int) -> Tensor:
    """Token of each slot, [B, H, slots], -1 for none; without an order the slots end with the last token."""
    length = x.shape[1]
    tokens = block_tokens(order, -(-length // block), block, length, x.device).flatten(2)
    return tokens[..., : length if order is None else tokens.shape[2]].expand(x.shape[0], heads, -1)


def _hidden(problem: Problem, k_tokens: Tensor) -> Tensor:
    """Which key slots no query may see, bool [B, H, slots]."""
    hidden = k_tokens < 0
    return hidden if problem.key_bias is None else hidden | (_in_slots(problem.key_bias, k_tokens) == -math.inf)


def _listed(problem: Problem, slots: int) -> Tensor:
    """Whether a query block passes over a key block, or lists it as partial or full, int32 [B|1, H|1, Nq, Nk]."""
    index, count, blocks = problem.index, problem.count[..., None], -(-slots // problem.block_k)
    full = torch.zeros_like(count) if problem.full_count is None else problem.full_count[..., None]
    full = full if problem.splits else count
    entry = torch.arange(index.shape[3], device=index.device)
    kind = (entry < count).int() + ((entry < full) & (entry < count)).int()
    index, kind = torch.broadcast_tensors(index, kind)
    # what is not used goes to an extra column, so that it cannot overwrite what is
    table = kind.new_zeros(*index.shape[:3], blocks + 1)
    return table.scatter_(3, torch.where(kind > PASSED, index, blocks).long(), kind)[..., :blocks]


def _in_some_list(listed: Tensor, problem: Problem, k_tokens: Tensor) -> Tensor:
    """Which key slots some query block computes, bool [B|1, H|1, slots]."""
    some = (listed > PASSED).any(2).repeat_interleave(problem.block_k, 2)
    return some[..., : k_tokens.shape[2]]


def _block_mask(problem: Problem, q_tokens: Tensor, k_tokens: Tensor, listed: Tensor) -> BlockMask:
    block_q, block_k, predicate = problem.block_q, problem.block_k, problem.predicate
    table = listed.expand(*q_tokens.shape[:2], -1, -1)
    places = None
    if predicate is not None:
        places = predicate.q_coords[:, q_tokens.clamp(min=0)], predicate.k_coords[:, k_tokens.clamp(min=0)]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kind = table[b, h, i // block_q, j // block_k]
        seen = (kind > PASSED) & (k_tokens[b, h, j] >= 0)
        if predicate is None or places is None:
            return seen
        near = within(predicate, *(places[0][axis, b, h, i] - places[1][axis, b, h, j] for axis in range(3)))
        return seen & (near | (kind == FULL))

    partial, full = (_lists(listed == kind) for kind in (PARTIAL, FULL))
    lengths = (q_tokens.shape[2], k_tokens.shape[2])
    return BlockMask.from_kv_blocks(*partial, *full, (block_q, block_k), visible, lengths)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and all of them with those first, int32."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _add_bias(problem: Problem, k_tokens: Tensor) -> Callable[..., Tensor] | None:
    if problem.key_bias is None:
        return None
    bias = _in_slots(problem.key_bias.float(), k_tokens)
    return lambda score, b, h, _, j: score + bias[b, h, j]


def _in_slots(bias: Tensor, k_tokens: Tensor) -> Tensor:
    """Bias [B|1, H|1, Sk] of each key slot, [B, H, slots]; holes give that of some token."""
    return bias.expand(*k_tokens.shape[:2], -1).gather(2, k_tokens.clamp(min=0))


def _scattered(problem: Problem, q_tokens: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Bring slots back into token order; a query without a key, or in no slot, has out 0 and lse -inf."""
    batch, length, heads, dim = problem.q.shape
    nothing = lse == -math.inf
    place = torch.where(q_tokens < 0, length, q_tokens).long()  # holes land in a spare last row
    whole = out.new_zeros(batch, heads, length + 1, dim)
    whole.scatter_(2, place.unsqueeze(-1).expand_as(out), out.masked_fill(nothing.unsqueeze(-1), 0))
    sums = torch.full((batch, heads, length + 1), -math.inf, dtype=torch.float32, device=out.device)
    sums.scatter_(2, place, lse)
    return whole[:, :, :-1].transpose(1, 2).contiguous(), sums[:, :, :-1].contiguous()
