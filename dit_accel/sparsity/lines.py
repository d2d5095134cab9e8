"""Axis 3 by lines: columns that all queries see, and displacements on the grid, both found on sampled rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from . import rows, selectors
from .scores import Scene, grid_weights
from .tiling import Tiling


@lru_cache(maxsize=64)
def displacements(tiling: Tiling, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the displacements between tiles: which one each pair has, int64 [units, units], and its token pairs."""
    at = np.rint(tiling.position[tiling.grid]).astype(np.int64)
    apart = (at[None] - at[:, None]).reshape(-1, 3)
    _, which = np.unique(apart, axis=0, return_inverse=True)
    tokens = tiling.tokens[tiling.grid].astype(np.float64)
    pairs = np.bincount(which.reshape(-1), weights=np.outer(tokens, tokens).reshape(-1))
    ids = torch.from_numpy(which.reshape(len(at), len(at))).to(device)
    return ids, torch.from_numpy(pairs.astype(np.float32)).to(device)


def select(scene: Scene, count: int, keep: torch.Tensor, share: float, columns: float) -> torch.Tensor:
    """Take the key tiles and the displacements that sampled rows attend to most, bool [B, H, units, units].

    MInference, Jiang et al. 2024, arXiv 2407.02490, "vertical-slash": there from the last queries, along diagonals of
    a causal map. Here from `count` rows spread over the grid; a slash is a displacement in frames, rows and columns,
    which does not wrap at row ends, judged by the mean over the rows that see it. `columns` of the share goes to
    columns, what is left to displacements, whole ones, while half of the next still fits.
    """
    seen, owner = _unit_mass(scene, count)
    weights = grid_weights(scene.cut.k)
    column = seen.mean(2, keepdim=True)
    nothing = torch.zeros_like(column, dtype=torch.bool)
    down = selectors.top_k(column, nothing, weights, share * columns)
    ids, pairs = displacements(scene.tiling, scene.q.device)
    here = ids[owner]  # [rows, units]
    total = torch.zeros(*seen.shape[:2], len(pairs), dtype=torch.float64, device=seen.device)
    total.index_add_(2, here.flatten(), seen.flatten(2).double())
    times = torch.zeros(len(pairs), dtype=torch.float64, device=seen.device)
    times.index_add_(0, here.flatten(), torch.ones_like(here, dtype=torch.float64).flatten())
    mean = (total / times.clamp(min=1)).float()
    spent = (down[:, :, 0] * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    along = selectors.fill(mean, pairs, (share - spent) * pairs.sum())
    return down | along[..., ids] | keep | ~torch.isfinite(column) | ~torch.isfinite(mean[..., ids])


def _unit_mass(scene: Scene, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of sampled rows to each grid unit, [B, H, rows, units], and the unit each row lies in."""
    sampled = rows.sample(scene.tiling.layout, count, scene.q.device)
    length, grid = scene.cut.length, scene.cut.k.grid
    unit = scene.cut.k.unit_of_token(length)[0, 0]
    gather = torch.zeros(length, scene.cut.k.units, device=unit.device).scatter_(1, unit[:, None], 1.0)[:, grid]
    parts = rows.attention(scene.q, scene.k, sampled, scene.scale, scene.bias)
    place = torch.zeros(scene.cut.k.units, dtype=torch.int64, device=unit.device)
    place[grid] = torch.arange(len(grid), device=unit.device)
    return torch.cat([weights @ gather for _, weights in parts], 2), place[unit[sampled]]
