"""Axis 2 by tree search: the best product met on the way down a key unit, without looking at all its keys."""

from __future__ import annotations

import torch

from ..config import TreeScore
from . import rows
from .scores import Scene, pieces


def score(scene: Scene, config: TreeScore) -> torch.Tensor:
    """Return the softmax over key units of the largest product met on a binary descent, float32 [B, H, units, units].

    InfiniteHiP, Lee et al. 2025, arXiv 2502.08910, after HiP, arXiv 2406.09827: a unit's keys are halved, the middle
    key of the left half is held against that of the right half (each by its largest product with any query of the
    query unit), the search goes on in the winner's half, and the unit is worth the best product met. Neighbours must
    be alike for that, so it wants a curve or tiles. There causal, in stages of 256, 32 and 8 keys; here one, a unit.
    """
    uploaded, tiling = scene.tiling.on(scene.q.device), scene.tiling
    slots = uploaded.slots.view(tiling.units, tiling.unit)[uploaded.grid_units]
    keys = scene.k[:, slots.clamp(min=0).long().flatten()].transpose(1, 2).float()
    queries = _asking(scene, config.queries)
    b, h, units, asking, d = queries.shape
    parts = queries.split(max(1, rows.BYTES // (4 * b * h * units * (d + asking))), 2)
    tokens = (slots >= 0).sum(-1)
    best = torch.cat([_descended(part, keys, tokens, tiling.unit) for part in parts], 2)
    return (best * scene.scale).softmax(-1)


def _asking(scene: Scene, size: int) -> torch.Tensor:
    """Return the means of `size` neighbouring queries, [B, H, units, queries, D]; where there are none, the first."""
    runs, tokens = pieces(scene.tiling, scene.q, size)
    means = (runs.sum(-2) / tokens.clamp(min=1)[:, None]).unflatten(2, (len(scene.cut.q.grid), -1))
    real = tokens.view(means.shape[2], -1, 1) > 0
    return torch.where(real, means, means[:, :, :, :1])


def _descended(queries: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor, unit: int) -> torch.Tensor:
    """Return the largest product met on the way down each key unit, [B, H, query units, key units].

    `queries` [B, H, query units, asking, D], `keys` [B, H, key units * unit, D], `tokens` int64 [key units], the real
    ones of each unit, which come first.
    """
    shape = (*queries.shape[:3], len(tokens))
    start = torch.arange(len(tokens), device=keys.device) * unit

    def met(at: torch.Tensor) -> torch.Tensor:
        index = (start + at).flatten(2)[..., None].expand(-1, -1, -1, keys.shape[-1])
        picked = keys.gather(2, index).unflatten(2, shape[2:])
        return (queries @ picked.mT).amax(3)

    low, high = torch.zeros(shape, dtype=torch.int64, device=keys.device), tokens.expand(shape)
    best = torch.full(shape, float("-inf"), device=keys.device)
    for _ in range((unit - 1).bit_length()):
        middle = (low + high) // 2
        left, right = met((low + middle) // 2), met((middle + high) // 2)
        best = torch.maximum(best, torch.maximum(left, right))
        low, high = torch.where(left > right, low, middle), torch.where(left > right, middle, high)
    return best
