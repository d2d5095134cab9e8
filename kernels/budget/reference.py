"""Budgets in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(score: Tensor, keep: Tensor, cost: Tensor, budget: float | Tensor) -> Tensor:
    """Fill each row; shapes as in `fill_rows`."""
    ranked, cost = prefer_kept(score, keep), cost[..., None, :]
    if isinstance(budget, float):
        budget = budget * cost.sum(-1, keepdim=True)
    return fill(ranked, cost, budget) | best(ranked) | keep | ~torch.isfinite(score)


def heads(score: Tensor, keep: Tensor, row_cost: Tensor, col_cost: Tensor, share: float) -> Tensor:
    """Fill each head; shapes as in `fill_heads`."""
    ranked = prefer_kept(score, keep)
    taken = fill_head(ranked, row_cost, col_cost, share)
    lonely = best(ranked) & ~taken.any(-1, keepdim=True)
    return taken | lonely | keep | ~torch.isfinite(score)


def prefer_kept(score: Tensor, keep: Tensor) -> Tensor:
    """Rank kept and undecidable pairs above all others so that they count against the budget first."""
    unsure = ~torch.isfinite(score)
    return score.masked_fill(keep | unsure, float("inf"))


def fill(ranked: Tensor, cost: Tensor, budget: Tensor | float) -> Tensor:
    """Take entries of the last axis, best first, while at least half of each still fits into the budget."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    spent = cost.expand_as(ranked).gather(-1, order)
    taken = spent.cumsum(-1) - spent / 2 <= budget
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, taken)


def fill_head(ranked: Tensor, row_cost: Tensor, col_cost: Tensor, share: float) -> Tensor:
    """Take in each head the best entries over all its rows until they cover `share` of the pairs of tokens."""
    pairs = (row_cost[..., :, None] * col_cost[..., None, :]).flatten(-2)
    budget = share * pairs.sum(-1, keepdim=True)
    return fill(ranked.flatten(-2), pairs, budget).view_as(ranked)


def best(ranked: Tensor) -> Tensor:
    """Mark the best pair of each row."""
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.argmax(-1, keepdim=True), True)
