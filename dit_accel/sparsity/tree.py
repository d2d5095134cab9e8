"""Axis 2 by tree search: the best product met on the way down a key unit, without looking at all its keys."""

from __future__ import annotations

import torch

from ..config import TreeScore
from ..kernels.descent import descend
from ..kernels.unit_means import unit_means
from .scores import Scene, runs_of


def score(scene: Scene, config: TreeScore) -> torch.Tensor:
    """Return the softmax over key units of the largest product met on a binary descent, float32 [B, H, units, units].

    InfiniteHiP, Lee et al. 2025, arXiv 2502.08910, after HiP, arXiv 2406.09827: a unit's keys are halved, the middle
    key of the left half is held against that of the right half (each by its largest product with any query of the
    query unit), the search goes on in the winner's half, and the unit is worth the best product met. Neighbours must
    be alike for that, so it wants a curve or tiles. There causal, in stages of 256, 32 and 8 keys; here one, a unit.
    """
    queries = _asking(scene, config.queries).to(scene.k.dtype)
    slots = runs_of(scene.tiling, scene.tiling.unit, scene.k.device).slots
    return (descend(queries, scene.k, slots, scene.tiling.unit) * scene.scale).softmax(-1)


def _asking(scene: Scene, size: int) -> torch.Tensor:
    """Return the means of `size` neighbouring queries, [B, H, units, queries, D]; where there are none, the first."""
    runs = runs_of(scene.tiling, size, scene.q.device)
    means = unit_means(scene.q, runs.slots[None, None], runs.length).unflatten(2, (len(scene.cut.q.grid), -1))
    real = runs.tokens.view(means.shape[2], -1, 1) > 0
    return torch.where(real, means, means[:, :, :, :1])
