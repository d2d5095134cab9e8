"""Axis 3, select: which unit pairs are computed, given their scores.

All selectors take float scores [B, H, rows, cols] over grid units, the tokens in each row and column unit ([rows] and
[cols], or [B|1, H|1, rows] where batch rows and heads differ), and a boolean mask of pairs that are kept whatever their
score; they return a boolean mask [B, H, rows, cols] that contains the kept pairs. A NaN or infinite score means
"compute it". A `least` is one number, or float64 [1, H, 1, 1]. No selector synchronises with the host.
"""

from __future__ import annotations

import torch

from ..kernels.budget import fill_heads, fill_rows
from ..kernels.budget import reference as budget_of
from ..kernels.top_mass import reference as mass_of
from ..kernels.top_mass import top_mass


def within(score: torch.Tensor, keep: torch.Tensor, radius: int) -> torch.Tensor:
    """Take all pairs whose rule distance (minus the score) is at most `radius` units."""
    return keep | (score >= -(radius + 0.5)) | ~torch.isfinite(score)


def top_k(
    score: torch.Tensor, keep: torch.Tensor, cols: torch.Tensor, share: float, spread: bool = False
) -> torch.Tensor:
    """Take in each row the best pairs until they cover `share` of the grid's key tokens, the best one always.

    `spread`: the heads whose best pairs hold more than 0.8 of the score, at most half of all, get half the share, as
    many of those that hold least get half as much again (AdaSpa, Xia et al. 2025).
    """
    if not spread:
        return fill_rows(score, keep, cols, float(share))
    cost = cols[..., None, :]
    whole = cost.sum(-1, keepdim=True)
    held = budget_of.fill(budget_of.prefer_kept(score, keep), cost, share * whole)
    shares = _spread_over_heads(score, held, share)
    return fill_rows(score, keep, cols, shares * whole)


def fill(score: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor | float) -> torch.Tensor:
    """Take entries of the last axis, best first, while at least half of each still fits, and the best one always."""
    return budget_of.fill(score, cost, budget) | budget_of.best(score)


def within_budget(score: torch.Tensor, keep: torch.Tensor, cols: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Take in each row the best pairs until they cover its own budget of key tokens, [B, H, rows, 1]."""
    return fill_rows(score, keep, cols, budget)


def _spread_over_heads(score: torch.Tensor, taken: torch.Tensor, share: float) -> torch.Tensor:
    """Return each head's share, [B, H, 1, 1], the mean of them unchanged."""
    finite = torch.where(torch.isfinite(score), score, 0)
    recall = (finite * taken).sum((-1, -2)) / finite.sum((-1, -2)).clamp(min=torch.finfo(finite.dtype).tiny)
    heads = recall.shape[-1]
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    moved = (recall > 0.8).sum(-1, keepdim=True).clamp(max=heads // 2)
    change = min(share / 2, 1 - share)
    shares = share - change * (rank < moved).float() + change * (rank >= heads - moved).float()
    return shares[..., None, None]


def percentile(
    score: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, share: float
) -> torch.Tensor:
    """Take in each head the best pairs over all rows until they cover `share` of the pairs of tokens.

    DraftAttention, Shen et al. 2025. There a row may end up empty; here its best pair is always taken.
    """
    return fill_heads(score, keep, rows, cols, float(share))


def top_p(score: torch.Tensor, keep: torch.Tensor, p: float, least: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Take in each row the best pairs until they hold `p` of the row's score, the crossing one included.

    At least a share `least` of the columns is taken (Jenga, Zhang et al. 2025; Sparse VideoGen 2, Yang et al. 2025).
    """
    return top_mass(score, keep, p, least)


def top_p_of_density(
    score: torch.Tensor,
    keep: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
    share: float,
    least: float | torch.Tensor = 0.0,
) -> torch.Tensor:
    """Take in each head the pairs that top-p would, at the p where they cover `share` of the pairs of tokens.

    Rows of concentrated score then take few pairs and flat ones many, as under top-p, but the cost is known.
    """
    order, before = mass_of.mass_before(score)
    first = mass_of.first(before, least)
    rank = torch.zeros_like(before).scatter_(-1, order, -before.masked_fill(first, -1.0))
    keep = keep | ~torch.isfinite(score)
    floor = torch.zeros_like(first, dtype=torch.bool).scatter_(-1, order, first)
    best = budget_of.best(rank.masked_fill(keep, float("inf")))
    return fill_heads(rank, keep, rows, cols, float(share)) | floor | best


def threshold(score: torch.Tensor, keep: torch.Tensor, above: float) -> torch.Tensor:
    """Take all pairs whose score exceeds `above`; a row that would stay empty gets its best pair.

    SALE, arXiv 2505.24179, where no row is empty because each sees the sinks and its own surroundings.
    """
    taken = (score > above) | keep | ~torch.isfinite(score)
    return taken | (budget_of.best(score) & ~taken.any(-1, keepdim=True))


def cumulative(score: torch.Tensor, keep: torch.Tensor, p: float, rescale: bool) -> torch.Tensor:
    """Take in each head the best pairs over all rows until they hold `p` of the head's score, the crossing included.

    VMoBA, Wu et al. 2025, with `rescale`: scores moved to 0..1 in each row first. FlexPrefill, Lai et al. 2025, does
    the same over softmax maps. The best pair of a row is always taken.
    """
    finite = torch.isfinite(score)
    if rescale:
        low = score.masked_fill(~finite, float("inf")).amin(-1, keepdim=True)
        high = score.masked_fill(~finite, float("-inf")).amax(-1, keepdim=True)
        score = (score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)
    order, before = mass_of.mass_before(score.flatten(-2))
    mask = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before < p).view_as(score)
    return mask | budget_of.best(torch.where(finite, score, 0)) | keep | ~finite
