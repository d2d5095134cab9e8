"""Axis 3, select: which unit pairs are computed, given their scores.

All selectors take float scores [B, H, rows, cols] over grid units, the tokens in each row and column unit, and a
boolean mask of pairs that are kept whatever their score; they return a boolean mask [B, H, rows, cols] that
contains the kept pairs. A NaN or infinite score means "compute it". No selector synchronises with the host.
"""

from __future__ import annotations

import torch


def _prefer_kept(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rank kept and undecidable pairs above all others so that they count against the budget first."""
    unsure = ~torch.isfinite(scores)
    return scores.masked_fill(keep | unsure, float("inf"))


def _fill_budget(ranked: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor | float) -> torch.Tensor:
    """Take entries of the last axis, best first, while at least half of each still fits into the budget."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    spent = cost.expand_as(ranked).gather(-1, order)
    taken = spent.cumsum(-1) - spent / 2 <= budget
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, taken)


def _best(ranked: torch.Tensor) -> torch.Tensor:
    """Mark the best pair of each row."""
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, ranked.argmax(-1, keepdim=True), True)


def within(score: torch.Tensor, keep: torch.Tensor, radius: int) -> torch.Tensor:
    """Take all pairs whose rule distance (minus the score) is at most `radius` units."""
    return keep | (score >= -(radius + 0.5)) | ~torch.isfinite(score)


def top_k(
    score: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, share: float
) -> torch.Tensor:
    """Take in each row the best pairs until they cover `share` of the grid's key tokens, the best one always."""
    ranked = _prefer_kept(score, keep)
    taken = _fill_budget(ranked, cols, share * cols.sum())
    return taken | _best(ranked) | keep | ~torch.isfinite(score)


def percentile(
    score: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, share: float
) -> torch.Tensor:
    """Take in each head the best pairs over all rows until they cover `share` of the pairs of tokens.

    DraftAttention, Shen et al. 2025. There a row may end up empty; here its best pair is always taken.
    """
    ranked = _prefer_kept(score, keep).flatten(-2)
    pairs = rows[:, None] * cols[None]
    taken = _fill_budget(ranked, pairs.flatten(), share * pairs.sum()).view_as(score)
    best = _best(ranked.view_as(score)) & ~taken.any(-1, keepdim=True)
    return taken | best | keep | ~torch.isfinite(score)


def top_p(score: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
    """Take in each row the best pairs until they hold `p` of the row's score, the crossing one included."""
    mass = torch.where(torch.isfinite(score), score, 0).clamp(min=0)
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    taken = ordered.cumsum(-1) - ordered < p
    mask = torch.zeros_like(taken).scatter_(-1, order, taken)
    return mask | keep | ~torch.isfinite(score)
