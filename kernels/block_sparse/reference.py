"""Block-sparse attention in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import Predicate, Problem


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attend query block by query block; cost follows the number of kept keys.

    Shapes as in `block_sparse_attention`. Arithmetic is fp32 (fp64 for fp64 inputs) whatever the input.
    """
    q, batch, heads = problem.q, problem.q.shape[0], problem.q.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    # one list group per batch row and head, or one for all of them: 1 in `lists` broadcasts
    q_tokens = block_tokens(problem.q_order, problem.index.shape[2], problem.block_q, q.shape[1], q.device)
    k_blocks = -(-problem.k.shape[1] // problem.block_k)
    k_tokens = block_tokens(problem.k_order, k_blocks, problem.block_k, problem.k.shape[1], q.device)
    keys, values = Rows(problem.k, heads, compute), Rows(problem.v, heads, compute)
    queries = Rows(q, heads, compute)
    out = torch.zeros(batch, heads, q.shape[1] + 1, q.shape[3], dtype=compute, device=q.device)
    lse = torch.full((batch, heads, q.shape[1] + 1), -math.inf, dtype=compute, device=q.device)
    used = problem.count.clamp(max=problem.index.shape[3])
    widest = used.amax(dim=(0, 1)).tolist()
    for block, width in enumerate(widest):
        if width == 0:
            continue
        rows = q_tokens[:, :, block]  # [b, h, bq]
        cols, partial = _key_tokens(problem, k_tokens, used, block, width)  # [b, h, n], [b, h, n]
        mask = _visible(problem, rows, cols, partial)  # [b, h, bq|1, n] or None
        logits = (queries.take(rows) * problem.scale) @ keys.take(cols).mT  # [B, H, bq, n]
        if problem.key_bias is not None:
            logits = logits + _at(problem.key_bias.to(compute), cols).unsqueeze(2)
        picked = values.take(cols)  # [B, H, n, D]
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
            # a weight of zero does not silence a NaN, so keys that no row sees are zeroed themselves
            picked = picked.masked_fill(~mask.any(dim=2).unsqueeze(-1), 0.0)
        top = logits.amax(dim=-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)  # a row without keys: exp(-inf - 0) is 0
        weights = logits.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)  # [B, H, bq, 1]
        # holes hold token -1: they land in the spare last row, which is dropped
        _put(out, rows, weights @ picked / total.masked_fill(total == 0, 1.0))
        _put(lse, rows, (top + total.log()).squeeze(-1))
    return out[:, :, :-1].transpose(1, 2).contiguous().to(q.dtype), lse[:, :, :-1].float().contiguous()


class Rows:
    """The rows of a [B, S, H, D] tensor by (batch, head, token), key heads repeated for their queries."""

    def __init__(self, tensor: Tensor, heads: int, dtype: torch.dtype) -> None:
        batch, length, own_heads, dim = tensor.shape
        self.flat = tensor.transpose(1, 2).to(dtype).reshape(batch * own_heads * length, dim)
        head = torch.arange(heads, device=tensor.device) // (heads // own_heads)
        first = torch.arange(batch, device=tensor.device)[:, None] * own_heads + head
        self.first = (first * length).unsqueeze(-1)  # [B, H, 1]

    def take(self, tokens: Tensor) -> Tensor:
        """Rows [B, H, n, D] of `tokens` [B|1, H|1, n]; a hole (-1) reads some row of its head."""
        picked = self.first + tokens.clamp(min=0)
        return self.flat.index_select(0, picked.flatten()).view(*picked.shape, -1)


def block_tokens(order: Tensor | None, blocks: int, block: int, length: int, device: torch.device) -> Tensor:
    """Token of each slot, [b, h, blocks, block], -1 for none."""
    if order is not None:
        return order.long().unflatten(-1, (-1, block))
    slots = torch.arange(blocks * block, device=device)
    return slots.masked_fill(slots >= length, -1).view(1, 1, blocks, block)


def _key_tokens(problem: Problem, k_tokens: Tensor, used: Tensor, block: int, width: int) -> tuple[Tensor, Tensor]:
    """Key tokens of one query block's list, -1 for none, and whether each lies in a partial block."""
    entry = torch.arange(width, device=used.device)
    index = problem.index[:, :, block, :width].long()
    unused = entry >= used[:, :, block, None]
    full = problem.full_count
    partial = (entry >= full[:, :, block, None]) if full is not None else entry.new_ones(1, 1, width).bool()
    b, h = torch.broadcast_shapes(index.shape[:2], unused.shape[:2], k_tokens.shape[:2])
    index = index.masked_fill(unused, 0).expand(b, h, width)
    tokens = k_tokens.expand(b, h, -1, -1).gather(2, index.unsqueeze(-1).expand(-1, -1, -1, problem.block_k))
    tokens = tokens.masked_fill(unused.unsqueeze(-1), -1)
    return tokens.flatten(2), partial.repeat_interleave(problem.block_k, dim=2)


def _visible(problem: Problem, rows: Tensor, cols: Tensor, partial: Tensor) -> Tensor | None:
    """Which pairs may attend, [b, h, bq|1, n]; None when all may."""
    mask = (cols >= 0).unsqueeze(2)
    if problem.key_bias is not None:
        mask = mask & (_at(problem.key_bias, cols) != -math.inf).unsqueeze(2)
    if problem.predicate is not None:
        near = admitted(problem.predicate, rows, cols) & (rows >= 0).unsqueeze(-1)
        mask = mask & (near | ~partial.unsqueeze(2))
    return None if mask.all() else mask


def admitted(predicate: Predicate, rows: Tensor, cols: Tensor) -> Tensor:
    """The predicate on every pair, [b, h, bq, n]; holes give any answer."""
    q, k = predicate.q_coords[:, rows.clamp(min=0)], predicate.k_coords[:, cols.clamp(min=0)]
    return within(predicate, *(q.unsqueeze(-1) - k.unsqueeze(-2)))


def within(predicate: Predicate, d0: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """The predicate on differences of coordinates, a bool each."""
    r0, r1, r2 = predicate.radius
    near = d0.abs() <= r0
    if predicate.kind == "box":
        near = near & (d1.abs() <= r1) & (d2.abs() <= r2)
    elif predicate.kind == "disk":
        near = near & (d1 * d1 + d2 * d2 <= r1 * r1)
    return near


def _at(bias: Tensor, cols: Tensor) -> Tensor:
    """Bias [b, h, n] of the tokens `cols` [b', h', n]."""
    b, h = torch.broadcast_shapes(bias.shape[:2], cols.shape[:2])
    return bias.expand(b, h, -1).gather(2, cols.clamp(min=0).expand(b, h, -1))


def _put(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write `values` [B, H, bq, ...] to the tokens `rows` [b, h, bq]; -1 is the last one."""
    batch, heads = target.shape[:2]
    b = torch.arange(batch, device=target.device)[:, None, None]
    h = torch.arange(heads, device=target.device)[None, :, None]
    target[b, h, rows] = values
