"""From what each head loses by each pattern to the pattern it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..config import HeadChoice
from .seen import Numbers

LEFT_OUT = 0.03  # of all heads, at most: Sparse-vDiT, Chen et al. 2025, whose quality falls off beyond


def choose(choice: HeadChoice, losses: Numbers, costs: Numbers) -> npt.NDArray[np.int64]:
    """Return the pattern of each head, int64 [heads]; one more than the last means everything.

    `losses`, `costs` [patterns, heads]: what a head loses by a pattern, and the share of all pairs that it computes.
    By price (PARO, Zhao et al. 2025; Sparse-vDiT, Chen et al. 2025) or within a budget over all heads (MoA, Fu et al.
    2024; DuoAttention, Xiao et al. 2024; Sliding Tile Attention, Zhang et al. 2025). A head whose losses are not
    finite, or all above the limit, computes everything.
    """
    unsure = ~np.isfinite(losses).all(0)
    if choice.limit is not None:
        unsure |= (losses > choice.limit).all(0)
    losses = _with_few_left_out(choice, losses)
    unsure |= ~np.isfinite(losses).any(0)
    best = np.full(losses.shape[1], len(choice.options))
    known = np.flatnonzero(~unsure)
    if choice.budget is None:
        best[known] = (losses + choice.price * costs)[:, known].argmin(0)
    else:
        room = choice.budget * losses.shape[1] - int(unsure.sum())  # the others are paid for first
        best[known] = spend(losses[:, known], costs[:, known], room)
    return best


def _with_few_left_out(choice: HeadChoice, losses: Numbers) -> Numbers:
    """Return the losses with those of computing nothing infinite, but for the few heads that lose least by it."""
    losses = losses.copy()
    for number, option in enumerate(choice.options):
        if option.select.kind == "none":
            least_first = losses[number].argsort(kind="stable")  # NaN comes last
            losses[number, least_first[int(LEFT_OUT * losses.shape[1]) :]] = np.inf
    return losses


def spend(losses: Numbers, costs: Numbers, room: float) -> npt.NDArray[np.int64]:
    """Return the pattern of each head, int64 [heads], so that their costs together stay within `room`.

    Each head starts at its cheapest pattern. Steps along the lower convex hulls of (cost, loss) are taken in order of
    loss saved per cost, which no other choice of the same total beats but for the last step; a step that does not fit
    ends its head's way, and smaller ones go on. Where few heads leave a gap, one pattern for all of them may be better,
    and is then taken. The cheapest patterns are taken even if they alone are above `room`.
    """
    heads = range(losses.shape[1])
    best = _along_hulls(losses, costs, room)
    fits = costs.sum(1) <= room + 1e-9
    alike = np.where(fits, losses.sum(1), np.inf)
    return np.full_like(best, alike.argmin()) if alike.min(initial=np.inf) < losses[best, heads].sum() else best


def _along_hulls(losses: Numbers, costs: Numbers, room: float) -> npt.NDArray[np.int64]:
    heads = range(losses.shape[1])
    hulls = [_hull(losses[:, head], costs[:, head]) for head in heads]
    best = np.array([hull[0] for hull in hulls], dtype=np.int64)
    room -= float(costs[best, heads].sum())
    steps = [step for head in heads for step in _steps(head, hulls[head], losses[:, head], costs[:, head])]
    ended = set[int]()
    for _, head, pattern, cost in sorted(steps, key=lambda step: -step[0]):  # stable: a head's own steps stay in order
        if head in ended or cost > room + 1e-9:
            ended.add(head)
            continue
        best[head], room = pattern, room - cost
    return best


def _steps(head: int, hull: Sequence[int], losses: Numbers, costs: Numbers) -> Iterator[tuple[float, int, int, float]]:
    """Yield (loss saved per cost, head, pattern, cost) of each step along a hull."""
    for a, b in pairwise(hull):
        cost = float(costs[b] - costs[a])
        yield float(losses[a] - losses[b]) / cost, head, b, cost


def _hull(losses: Numbers, costs: Numbers) -> list[int]:
    """Return the patterns on the lower convex hull of (cost, loss), cheapest first, each losing less than the last."""
    hull: list[int] = []
    for pattern in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not np.isfinite(losses[pattern]) or (hull and losses[pattern] >= losses[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], losses, costs) <= _slope(hull[-1], pattern, losses, costs):
            hull.pop()
        hull.append(pattern)
    return hull


def _slope(a: int, b: int, losses: Numbers, costs: Numbers) -> float:
    """Return the loss saved per cost."""
    return float(losses[a] - losses[b]) / max(float(costs[b] - costs[a]), 1e-300)
