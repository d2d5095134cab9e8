"""Axis 3 by error: which unit pairs cost the output most when their mean key and value stand for them."""

from __future__ import annotations

import torch

from ..kernels.unit_error import unit_error
from . import selectors
from .scores import Scene, grid_means, grid_weights


def per_cost(scene: Scene, v: torch.Tensor) -> torch.Tensor:
    """Return the error of replacing a key unit by its means, per token, float32 [B, H, query units, key units].

    For the mean query of each unit: the length of sum_j exp(q k_j) v_j - n exp(q k̄) v̄ over the unit's tokens, divided
    by the sum of exp(q k) over the grid's keys and by n, what computing the unit costs. SVG-EAR, arXiv 2603.08982,
    spends its budget by estimated error per cost.
    """
    side = scene.cut.k.without_means()
    slots = side.slots if side.grid_slots is None else side.grid_slots
    queries, means = grid_means(scene.cut.q, scene.q), grid_means(side, v)
    error = unit_error(queries, scene.k, v, slots, side.grid_bounds, side.block, means, scene.scale)
    return error / side.grid_costs[..., None, :]


def select(
    scene: Scene, v: torch.Tensor, share: torch.Tensor, keep: torch.Tensor, p: float, least: float | torch.Tensor
) -> torch.Tensor:
    """Take in each row as many key tokens as top-p of `share` would, those of most error per token first: SVG-EAR."""
    cols = grid_weights(scene.cut.k)
    budget = (selectors.top_p(share, keep, p, least) * cols[..., None, :]).sum(-1, keepdim=True)
    return selectors.within_budget(per_cost(scene, v), keep | ~torch.isfinite(share), cols, budget)


def of_density(
    scene: Scene, v: torch.Tensor, keep: torch.Tensor, density: float, least: float | torch.Tensor
) -> torch.Tensor:
    """Take in each head the pairs of most error per token over all rows until they cover `density` of its pairs.

    The error of all queries together is least so. Half of that at most goes to a share `least` of each row's columns.
    """
    rows, cols = grid_weights(scene.cut.q), grid_weights(scene.cut.k)
    worst, most = per_cost(scene, v), density / 2
    floor = least.clamp(max=most) if isinstance(least, torch.Tensor) else min(least, most)
    budget = (cols.sum(-1)[..., None, None] * floor).float().expand(*worst.shape[:3], 1)
    first = selectors.within_budget(worst, torch.zeros_like(keep), cols, budget)
    return selectors.percentile(worst, keep | first, rows, cols, density)
