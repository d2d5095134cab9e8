"""Axis 3, select: which unit pairs are computed, given their scores.

All selectors take float scores [B, H, rows, cols] over grid units, the tokens in each row and column unit ([rows] and
[cols], or [B|1, H|1, rows] where batch rows and heads differ), and a boolean mask of pairs that are kept whatever their
score; they return a boolean mask [B, H, rows, cols] that contains the kept pairs. A NaN or infinite score means
"compute it". A `least` is one number, or float64 [1, H, 1, 1]. No selector synchronises with the host.
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
    score: torch.Tensor, keep: torch.Tensor, cols: torch.Tensor, share: float, spread: bool = False
) -> torch.Tensor:
    """Take in each row the best pairs until they cover `share` of the grid's key tokens, the best one always.

    `spread`: the heads whose best pairs hold more than 0.8 of the score, at most half of all, get half the share, as
    many of those that hold least get half as much again (AdaSpa, Xia et al. 2025).
    """
    ranked, cost = _prefer_kept(score, keep), cols[..., None, :]
    whole = cost.sum(-1, keepdim=True)
    if not spread:
        taken = _fill_budget(ranked, cost, share * whole)
    else:
        held = _fill_budget(ranked, cost, share * whole)
        shares = _spread_over_heads(score, held, share)
        taken = _fill_budget(ranked, cost, shares * whole)
    return taken | _best(ranked) | keep | ~torch.isfinite(score)


def fill(score: torch.Tensor, cost: torch.Tensor, budget: torch.Tensor | float) -> torch.Tensor:
    """Take entries of the last axis, best first, while at least half of each still fits, and the best one always."""
    return _fill_budget(score, cost, budget) | _best(score)


def within_budget(score: torch.Tensor, keep: torch.Tensor, cols: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Take in each row the best pairs until they cover its own budget of key tokens, [B, H, rows, 1]."""
    ranked = _prefer_kept(score, keep)
    taken = _fill_budget(ranked, cols[..., None, :], budget)
    return taken | _best(ranked) | keep | ~torch.isfinite(score)


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
    ranked = _prefer_kept(score, keep)
    taken = _fill_head(ranked, rows, cols, share)
    best = _best(ranked) & ~taken.any(-1, keepdim=True)
    return taken | best | keep | ~torch.isfinite(score)


def _fill_head(ranked: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, share: float) -> torch.Tensor:
    """Take in each head the best entries over all its rows until they cover `share` of the pairs of tokens."""
    pairs = (rows[..., :, None] * cols[..., None, :]).flatten(-2)
    budget = share * pairs.sum(-1, keepdim=True)
    return _fill_budget(ranked.flatten(-2), pairs, budget).view_as(ranked)


def top_p(score: torch.Tensor, keep: torch.Tensor, p: float, least: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Take in each row the best pairs until they hold `p` of the row's score, the crossing one included.

    At least a share `least` of the columns is taken (Jenga, Zhang et al. 2025; Sparse VideoGen 2, Yang et al. 2025).
    """
    order, before = _mass_before(score)
    taken = (before < p) | _first(before, least)
    mask = torch.zeros_like(taken).scatter_(-1, order, taken)
    return mask | keep | ~torch.isfinite(score)


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
    order, before = _mass_before(score)
    before = before.masked_fill(_first(before, least), -1.0)
    rank = torch.zeros_like(before).scatter_(-1, order, -before)
    ranked = rank.masked_fill(keep | ~torch.isfinite(score), float("inf"))
    taken = _fill_head(ranked, rows, cols, share)
    floor = torch.zeros_like(taken).scatter_(-1, order, _first(before, least))
    return taken | floor | _best(ranked) | keep | ~torch.isfinite(score)


def _mass_before(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's columns, best first, and the share of the row's score that lies before each of them."""
    mass = torch.where(torch.isfinite(score), score, 0).clamp(min=0)
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    return order, ordered.cumsum(-1) - ordered


def _first(ordered: torch.Tensor, least: float | torch.Tensor) -> torch.Tensor:
    """Mark the first `least` of the columns, rounded down."""
    share = least * ordered.shape[-1]
    count = share.long() if isinstance(share, torch.Tensor) else int(share)
    return (torch.arange(ordered.shape[-1], device=ordered.device) < count).expand_as(ordered)


def threshold(score: torch.Tensor, keep: torch.Tensor, above: float) -> torch.Tensor:
    """Take all pairs whose score exceeds `above`; a row that would stay empty gets its best pair.

    SALE, arXiv 2505.24179, where no row is empty because each sees the sinks and its own surroundings.
    """
    taken = (score > above) | keep | ~torch.isfinite(score)
    return taken | (_best(score) & ~taken.any(-1, keepdim=True))


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
    order, before = _mass_before(score.flatten(-2))
    mask = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before < p).view_as(score)
    return mask | _best(torch.where(finite, score, 0)) | keep | ~finite
