"""Block-sparse attention on a CPU: each query block's keys gathered side by side, then torch's fused CPU attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem
from .reference import Rows, admitted, block_tokens

CHUNK = 1 << 24  # elements of gathered keys that are attended at once: bounds memory


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attend all query blocks of one list length in one batch; cost follows the number of kept keys.

    Shapes as in `block_sparse_attention`. Arithmetic is that of torch's CPU attention in the dtype of the inputs.
    """
    q_tokens = _query_tokens(problem)
    queries = Rows(problem.q, problem.q.shape[2], problem.q.dtype).take(q_tokens.flatten(2))
    queries = queries.view(-1, 1, problem.block_q, problem.q.shape[3])
    blocks = _key_blocks(problem)
    lists = _lists(problem, blocks.per_head)
    out = queries.new_zeros(queries.shape)
    lse = torch.full(queries.shape[:3], -math.inf, dtype=torch.float32)
    for rows, width in _chunks(lists.count, problem.block_k * problem.q.shape[3]):
        picked = lists.index[rows, :width]
        keys, values = (x[picked].flatten(1, 2)[:, None] for x in (blocks.keys, blocks.values))
        mask = _mask(problem, q_tokens, blocks, lists, rows, picked)
        if problem.predicate is not None and mask is not None:  # no weight silences a NaN that no query of a block sees
            unseen = (mask == -math.inf).all(2).unsqueeze(-1)
            keys, values = keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0)
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[rows], keys, values, attn_mask=mask, scale=problem.scale
        )
        if mask is not None:
            nothing = (mask == -math.inf).all(-1)
            attended, sums = attended.masked_fill(nothing[..., None], 0), sums.masked_fill(nothing, -math.inf)
        out[rows], lse[rows] = attended, sums.float()
    return _scattered(problem, q_tokens, out, lse)


@dataclass(frozen=True)
class _KeyBlocks:
    """Key blocks of all heads, one after the other."""

    keys: Tensor  # [B * H * per_head, bk, D]; masked keys are zero, since no weight silences a NaN
    values: Tensor
    tokens: Tensor  # [B * H * per_head, bk], -1 for none
    bias: Tensor  # [B * H * per_head, bk], -inf for none
    plain: Tensor  # [B * H * per_head], whether the keys of a block all count alike
    per_head: int


@dataclass(frozen=True)
class _Lists:
    index: Tensor  # [B * H * Nq, M] among the blocks of all heads
    count: Tensor  # [B * H * Nq]
    full: Tensor  # [B * H * Nq], how many leading blocks ask no predicate


def _query_tokens(problem: Problem) -> Tensor:
    """Token of each query slot, [B, H, Nq, bq], -1 for none."""
    q = problem.q
    tokens = block_tokens(problem.q_order, problem.index.shape[2], problem.block_q, q.shape[1], q.device)
    return tokens.expand(q.shape[0], q.shape[2], -1, -1)


def _key_blocks(problem: Problem) -> _KeyBlocks:
    k, heads = problem.k, problem.q.shape[2]
    batch, length = k.shape[:2]
    slots = length if problem.k_order is None else problem.k_order.shape[-1]
    blocks = -(-slots // problem.block_k)
    tokens = block_tokens(problem.k_order, blocks, problem.block_k, length, k.device).expand(batch, heads, -1, -1)
    tokens = tokens.flatten(2)
    bias = torch.zeros(1, 1, 1, dtype=problem.q.dtype) if problem.key_bias is None else problem.key_bias
    bias = bias.to(problem.q.dtype).expand(batch, heads, length).gather(2, tokens.clamp(min=0))
    bias = bias.masked_fill(tokens < 0, -math.inf)
    hidden = (bias == -math.inf).unsqueeze(-1)
    shape = (batch * heads * blocks, problem.block_k)
    keys, values = (
        Rows(x, heads, x.dtype).take(tokens).masked_fill_(hidden, 0).view(*shape, -1) for x in (k, problem.v)
    )
    bias = bias.view(shape)
    return _KeyBlocks(keys, values, tokens.reshape(shape), bias, (bias == 0).all(-1), blocks)


def _lists(problem: Problem, per_head: int) -> _Lists:
    batch, heads = problem.q.shape[0], problem.q.shape[2]
    width = problem.index.shape[3]
    count = problem.count.clamp(max=width).long().expand(batch, heads, -1)
    index = problem.index.long().expand(batch, heads, -1, -1)
    first = torch.arange(batch * heads).view(batch, heads, 1, 1) * per_head
    full = torch.zeros_like(count) if problem.full_count is None else problem.full_count.long().expand_as(count)
    return _Lists((index + first).view(-1, width), count.flatten(), full.flatten())


def _chunks(count: Tensor, per_block: int) -> Iterator[tuple[Tensor, int]]:
    """Query blocks of one list length, with that length; those without any key are left out."""
    order = count.argsort(stable=True)
    lengths = count[order].tolist()
    stop = len(lengths)
    while stop and lengths[stop - 1]:
        width = lengths[stop - 1]
        start, most = stop, max(1, CHUNK // (width * per_block))
        while start and stop - start < most and lengths[start - 1] == width:
            start -= 1
        yield order[start:stop], width
        stop = start


def _mask(
    problem: Problem, q_tokens: Tensor, blocks: _KeyBlocks, lists: _Lists, rows: Tensor, picked: Tensor
) -> Tensor | None:
    """Added to the logits of a chunk, [n, 1, bq, keys], -inf for pairs that may not attend; None for nothing."""
    if problem.predicate is None and bool(blocks.plain[picked].all()):
        return None
    cols = blocks.tokens[picked].flatten(1)
    bias = blocks.bias[picked].flatten(1)[:, None, None]
    bias = bias.expand(len(rows), 1, problem.block_q, cols.shape[1])
    if problem.predicate is None:
        return bias
    near = admitted(problem.predicate, q_tokens.flatten(0, 2)[rows], cols)
    full = torch.arange(picked.shape[1]) < lists.full[rows, None]
    near = near | full.repeat_interleave(problem.block_k, dim=1)[:, None]
    return bias.masked_fill(~near[:, None], -math.inf)


def _scattered(problem: Problem, q_tokens: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Bring block results back into token order; what lies in holes is dropped."""
    batch, length, heads, dim = problem.q.shape
    place = q_tokens.flatten(2)
    place = place.masked_fill(place < 0, length)
    whole = out.new_zeros(batch, heads, length + 1, dim)
    whole.scatter_(2, place.unsqueeze(-1).expand(-1, -1, -1, dim), out.view(batch, heads, -1, dim))
    sums = torch.full((batch, heads, length + 1), -math.inf, dtype=torch.float32)
    sums.scatter_(2, place, lse.view(batch, heads, -1))
    return whole[:, :, :-1].transpose(1, 2).contiguous(), sums[:, :, :-1].contiguous()
