"""Run a recipe's axes once: layout, queries and keys in, a mask over unit pairs out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ..config import Keeps, PercentileSelect, Recipe, TopKSelect, TopPSelect, WithinSelect
from ..layout import TokenLayout
from . import frames, scores, selectors
from .tiling import Tiling, tiling


def tiling_for(recipe: Recipe, layout: TokenLayout) -> Tiling:
    """Return the recipe's cut of a layout (cached)."""
    return tiling(layout, recipe.order, recipe.block_q, recipe.block_k)


def state_bytes(recipe: Recipe, layout: TokenLayout, batch: int, heads: int) -> int:
    """Return the bytes a recipe keeps per attention site and guidance branch between steps."""
    if recipe.every == 1 or not recipe.content_driven:
        return 0
    units = tiling_for(recipe, layout).units
    return batch * heads * units * -(-units // 8)


def decide(recipe: Recipe, tiling: Tiling, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return which unit pairs are computed, bool [B|1, H|1, units, units].

    `q`, `k` [B, S, H, D]. Text rows and columns are always computed; the recipe chooses among grid pairs.
    """
    device = q.device
    grid = tiling.on(device).grid_units
    if recipe.score.kind == "geometry":
        score = scores.geometry(tiling, recipe.score, device)
    else:
        score = scores.pooled(tiling, q, k, scale)
    score = score[..., grid[:, None], grid[None]]
    keep = keep_mask(tiling, recipe.keeps, device)[grid[:, None], grid[None]]
    chosen = _select(recipe, tiling, score, keep, grid)
    mask = torch.ones(*chosen.shape[:2], tiling.units, tiling.units, dtype=torch.bool, device=device)
    mask[..., grid[:, None], grid[None]] = chosen
    return mask


def _select(
    recipe: Recipe, tiling: Tiling, score: torch.Tensor, keep: torch.Tensor, grid: torch.Tensor
) -> torch.Tensor:
    tokens = tiling.on(score.device).tokens[grid]
    select = recipe.select
    if isinstance(select, WithinSelect):
        return selectors.within(score, keep, select.radius)
    if isinstance(select, TopPSelect):
        return selectors.top_p(score, keep, select.p)
    share = grid_share(tiling.layout, select.density)
    if isinstance(select, TopKSelect):
        return selectors.top_k(score, keep, tokens, tokens, share)
    assert isinstance(select, PercentileSelect)
    return selectors.percentile(score, keep, tokens, tokens, share)


def grid_share(layout: TokenLayout, density: float) -> float:
    """Return which share of the grid's own pairs may be computed so that all pairs together reach `density`.

    Text rows and columns are always computed and count first; 0 when they alone are above the asked density.
    """
    cells = layout.length - layout.text
    always = layout.length**2 - cells**2
    return max(0.0, (density * layout.length**2 - always) / cells**2)


@lru_cache(maxsize=256)
def floor_note(recipe: Recipe, layout: TokenLayout) -> str:
    """Say in plain words when the asked density cannot be reached on this layout, else ''."""
    cells = layout.length - layout.text
    text_share = 1 - (cells / layout.length) ** 2
    least = text_share + _kept_pairs(recipe, layout) / layout.length**2
    if recipe.density is None or recipe.density >= least:
        return ""
    return (
        f"asked density {recipe.density:g}, the least here is {least:.2f}: {layout.text} text tokens beside {cells} "
        f"always take {text_share:.2f}, the kept blocks the rest; use a shorter text length or smaller tiles"
    )


def _kept_pairs(recipe: Recipe, layout: TokenLayout) -> float:
    """Count the grid's token pairs that are computed whatever their score."""
    tiling = tiling_for(recipe, layout)
    keep = keep_mask(tiling, recipe.keeps, torch.device("cpu")).numpy()[tiling.grid][:, tiling.grid]
    tokens = tiling.tokens[tiling.grid]
    return float((keep * np.outer(tokens, tokens)).sum())


def keep_mask(tiling: Tiling, keeps: Keeps, device: torch.device) -> torch.Tensor:
    """Return the unit pairs that are computed whatever their score, bool [units, units]."""
    mask = torch.zeros(tiling.units, tiling.units, dtype=torch.bool, device=device)
    if keeps.own:
        mask |= torch.eye(tiling.units, dtype=torch.bool, device=device)
    if keeps.first_frame and tiling.layout.main.frames > 1:
        mask |= torch.from_numpy(tiling.first_frame).to(device)[None]
    if keeps.own_frame:
        mask |= torch.from_numpy(frames.own_frame(tiling)).to(device)
    if keeps.own_place:
        mask |= torch.from_numpy(frames.own_place(tiling)).to(device)
    if keeps.sinks:
        mask |= torch.from_numpy(tiling.sink_rank < keeps.sinks).to(device)[None]
    return mask
