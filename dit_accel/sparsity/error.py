"""Axis 3 by error: which unit pairs cost the output most when their mean key and value stand for them."""

from __future__ import annotations

import torch

from . import selectors
from .cut import Side
from .rows import BYTES
from .scores import Scene, grid_means, grid_weights, in_slots


def per_cost(scene: Scene, v: torch.Tensor) -> torch.Tensor:
    """Return the error of replacing a key unit by its means, per token, float32 [B, H, query units, key units].

    For the mean query of each unit: the length of sum_j exp(q k_j) v_j - n exp(q k̄) v̄ over the unit's tokens, divided
    by the sum of exp(q k) over the grid's keys and by n, what computing the unit costs. SVG-EAR, arXiv 2603.08982,
    spends its budget by estimated error per cost; a few query units are done at a time.
    """
    side = scene.cut.k
    queries = grid_means(scene.cut.q, scene.q) * scene.scale
    keys, values = _by_block(side, scene.k), _by_block(side, v)
    hole = (side.slots < 0).unflatten(-1, (-1, side.block))
    text = _is_text(side)[..., None]
    means_k = grid_means(side.without_means(), scene.k)
    means_v = grid_means(side.without_means(), v)
    tokens = grid_weights(side)[..., None, :]
    b, h, blocks, _, d = keys.shape
    owner = side.owner.expand(b, h, -1)[:, :, None, :, None].expand(-1, -1, 1, -1, d)
    out = []
    for part in queries.split(max(1, BYTES // (4 * b * h * blocks * (d + side.block))), dim=2):
        logits = torch.einsum("bhrd,bhnsd->bhrns", part, keys)
        logits = logits.masked_fill((hole | text)[:, :, None], float("-inf"))
        top = logits.amax((-1, -2), keepdim=True)
        weights = (logits - top).exp()
        exact = torch.zeros(b, h, part.shape[2], side.units, d, device=v.device)
        exact.scatter_add_(3, owner.expand(-1, -1, part.shape[2], -1, -1), torch.einsum(
            "bhrns,bhnsd->bhrnd", weights, values
        ))  # fmt: skip
        pooled = (part @ means_k.mT - top[..., 0]).exp() * tokens
        error = (exact[:, :, :, side.grid] - pooled[..., None] * means_v[:, :, None]).norm(dim=-1)
        out.append(error / weights.sum((-1, -2))[..., None])
    return torch.cat(out, 2) / tokens.clamp(min=1)


def _by_block(side: Side, x: torch.Tensor) -> torch.Tensor:
    """Lay [B, S, H, D] into blocks, float32 [B, H, blocks, block, D], 0 in holes."""
    hole = (side.slots < 0).unflatten(-1, (-1, side.block))[..., None]
    return in_slots(side, x).unflatten(2, (-1, side.block)).float().masked_fill(hole, 0)


def _is_text(side: Side) -> torch.Tensor:
    grid = torch.zeros(side.units, dtype=torch.bool, device=side.grid.device)
    grid[side.grid] = True
    return ~grid[side.owner]


def select(
    scene: Scene,
    v: torch.Tensor,
    share: torch.Tensor,
    keep: torch.Tensor,
    p: float,
    least: float | torch.Tensor,
    asked: float | None,
) -> torch.Tensor:
    """Take in each row as many key tokens as top-p would (or its density), those of most error per cost first."""
    rows, cols = grid_weights(scene.cut.q), grid_weights(scene.cut.k)
    if asked is None:
        as_top_p = selectors.top_p(share, keep, p, least)
    else:
        as_top_p = selectors.top_p_of_density(share, keep, rows, cols, asked, least)
    budget = (as_top_p * cols[..., None, :]).sum(-1, keepdim=True)
    return selectors.within_budget(per_cost(scene, v), keep | ~torch.isfinite(share), cols, budget)
