"""Axis 2, score: how much a pair (query unit, key unit) is worth. Higher is better."""

from __future__ import annotations

import torch

from ..config import GeometryScore
from .tiling import Tiling

TIE = 1e-3  # Euclidean share that orders pairs of equal rule distance, far below one unit


def distance(tiling: Tiling, shape: str, device: torch.device) -> torch.Tensor:
    """Return the rule distance of all unit pairs, float32 [units, units], in unit lengths.

    "window": the largest difference over the axes. "cross": the smallest difference over the axes that the grid
    has (same row or column of a picture, same plane of a video); GRAT, Ren et al. 2025.
    """
    position = tiling.on(device).position
    delta = (position[:, None] - position[None]).abs()
    if shape == "window":
        return delta.amax(-1)
    axes = [axis for axis, extent in enumerate(tiling.layout.main.shape) if extent > 1] or [2]
    return torch.stack([delta[..., axis] for axis in axes], -1).amin(-1)  # a list as index would wait for the device


def geometry(tiling: Tiling, config: GeometryScore, device: torch.device) -> torch.Tensor:
    """Return minus the rule distance, ties broken by the straight distance, float32 [1, 1, units, units]."""
    position = tiling.on(device).position
    straight = (position[:, None] - position[None]).square().sum(-1).sqrt()
    return -(distance(tiling, config.shape, device) + TIE * straight)[None, None]


def pooled(tiling: Tiling, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the draft map: softmax over grid keys of mean query times mean key, float32 [B, H, units, units].

    `q`, `k` [B, S, H, D]. DraftAttention, Shen et al. 2025; text units get 0 and are kept by rule anyway.
    A NaN or Inf anywhere in a unit makes its scores non-finite, which selectors read as "compute it".
    """
    mean_q, mean_k = unit_means(tiling, q), unit_means(tiling, k)
    logits = torch.einsum("bqhd,bkhd->bhqk", mean_q, mean_k) * scale
    grid = tiling.on(q.device).grid
    logits = logits.masked_fill(~grid, float("-inf"))
    return logits.softmax(-1)


def unit_means(tiling: Tiling, x: torch.Tensor) -> torch.Tensor:
    """Average the tokens of each unit, [B, S, H, D] -> float32 [B, units, H, D]."""
    device = tiling.on(x.device)
    b, _, h, d = x.shape
    picked = x[:, device.slots.clamp(min=0).long()]
    picked = picked.view(b, tiling.units, tiling.unit, h, d)
    hole = (device.slots < 0).view(tiling.units, tiling.unit)[None, :, :, None, None]
    total = picked.masked_fill(hole, 0).sum(2, dtype=torch.float32)
    return total / device.tokens[None, :, None, None]
