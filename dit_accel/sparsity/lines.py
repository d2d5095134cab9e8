"""Axis 3 by lines: columns that all queries see, and displacements on the grid, both found on sampled rows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ..config import LinesSelect
from . import rows, selectors
from .scores import Scene, grid_weights
from .tiling import Tiling


@lru_cache(maxsize=64)
def displacements(tiling: Tiling, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the displacements between tiles: which one each pair has, int64 [units, units]; its pairs, its queries.

    Runs of words, where they are ranked, lie on an axis of their own.
    """
    at = np.rint(tiling.position[tiling.grid]).astype(np.int64)
    words = tiling.words[tiling.grid]
    at = np.column_stack([at * ~words[:, None], (at[:, 2] + 1) * words])
    apart = (at[None] - at[:, None]).reshape(-1, 4)
    _, which = np.unique(apart, axis=0, return_inverse=True)
    tokens = tiling.tokens[tiling.grid].astype(np.float64)
    which = which.reshape(-1)
    counts = (
        np.bincount(which, weights=weights.reshape(-1)).astype(np.float32)
        for weights in (np.outer(tokens, tokens), np.repeat(tokens, len(tokens)))
    )
    pairs, queries = (torch.from_numpy(count).to(device) for count in counts)
    return torch.from_numpy(which.reshape(len(at), len(at))).to(device), pairs, queries


def select(scene: Scene, count: int, keep: torch.Tensor, share: float, config: LinesSelect) -> torch.Tensor:
    """Take the key tiles and the displacements that sampled rows attend to most, bool [B, H, units, units].

    MInference, Jiang et al. 2024, arXiv 2407.02490, "vertical-slash": there from the last queries, along diagonals of
    a causal map. Here from `count` rows spread over the grid; a slash is a displacement in frames, rows and columns,
    which does not wrap at row ends, judged by the mean over the rows that see it. `columns` of the share goes to
    columns, what is left to displacements, whole ones, while half of the next still fits. With a `p`, as in
    FlexPrefill, Lai et al. 2025, arXiv 2502.20766: the fewest of each that hold that share of the rows' attention, a
    displacement counted by the queries of the whole grid that have it.
    """
    sampled = rows.sample(scene.tiling.layout, count, scene.q.device)
    seen = rows.unit_mass(scene.cut.k, scene.q, scene.k, sampled, scene.scale, scene.bias)
    owner = _place_of(scene, sampled)
    weights = grid_weights(scene.cut.k)
    column = seen.mean(2, keepdim=True)
    nothing = torch.zeros_like(column, dtype=torch.bool)
    ids, pairs, queries = displacements(scene.tiling, scene.q.device)
    here = ids[owner]  # [rows, units]
    total = torch.zeros(*seen.shape[:2], len(pairs), dtype=torch.float64, device=seen.device)
    total.index_add_(2, here.flatten(), seen.flatten(2).double())
    times = torch.zeros(len(pairs), dtype=torch.float64, device=seen.device)
    times.index_add_(0, here.flatten(), torch.ones_like(here, dtype=torch.float64).flatten())
    mean = (total / times.clamp(min=1)).float()
    if config.p is not None:
        down = selectors.top_p(column, nothing, config.p)
        held = (mean * queries)[:, :, None]
        along = selectors.top_p(held, torch.zeros_like(held, dtype=torch.bool), config.p)[:, :, 0]
    else:
        down = selectors.top_k(column, nothing, weights, share * config.columns)
        spent = (down[:, :, 0] * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        along = selectors.fill(mean, pairs, (share - spent) * pairs.sum())
    return down | along[..., ids] | keep | ~torch.isfinite(column) | ~torch.isfinite(mean[..., ids])


def _place_of(scene: Scene, sampled: torch.Tensor) -> torch.Tensor:
    """Return which unit of the grid each sampled row lies in, int64 [rows]."""
    side = scene.cut.k
    place = torch.zeros(side.units, dtype=torch.int64, device=side.grid.device)
    place[side.grid] = torch.arange(len(side.grid), device=side.grid.device)
    return place[side.unit_of_token(scene.cut.length)[0, 0, sampled]]
