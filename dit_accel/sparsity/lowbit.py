"""Axis 2 in few bits: the largest attention between units, against exact log-sum-exps over the pairs kept anyway."""

from __future__ import annotations

import torch

from ..config import LowBitScore
from ..kernels.block_max import block_max
from .content import grid_tokens
from .plan import Operands, from_units
from .scores import Scene, runs_of


def score(scene: Scene, config: LowBitScore, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return ln of the largest attention that any key of a unit gets from any query of a unit, [B, H, units, units].

    SALE, Ji et al. 2025, arXiv 2505.24179. Queries and keys lose their means over the grid and are rounded to a few
    bits; the mean query's part of the product stays exact. It is held against the log-sum-exp over text and kept pairs
    (`keep` bool [units, units]), there the sinks and the local window. That is at most the true one, so a unit is kept
    too often rather than too seldom. There one scale serves a few tokens, here each token has its own.
    """
    grid = grid_tokens(scene.tiling, scene.q.device)
    q, k = scene.q.float(), scene.k.float()
    mean_q, mean_k = (x[:, grid].mean(1, keepdim=True) for x in (q, k))
    away = k - mean_k
    column = (mean_q * away).sum(-1).transpose(1, 2) * scene.scale  # the mean query's product with each key
    if scene.bias is not None:
        column = column + scene.bias
    row = (q * mean_k).sum(-1).transpose(1, 2) * scene.scale - _reference(scene, v, keep)  # what each query has in all
    few_q, few_k = (rounded(x, config.bits).to(scene.q.dtype) for x in (q - mean_q, away))
    slots, unit = runs_of(scene.tiling, scene.tiling.unit, q.device).slots, scene.tiling.unit
    return block_max(few_q, few_k, slots, slots, unit, scene.scale, row, column)


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round each token [..., D] to whole multiples of its largest entry over 2 ** (bits - 1) - 1."""
    steps = 2 ** (bits - 1) - 1
    step = (x.abs().amax(-1, keepdim=True) / steps).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / step).round() * step


def _reference(scene: Scene, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the exact log-sum-exp of each query of the grid over text and kept units, float32 [B, H, S]."""
    cut = scene.cut
    mask = torch.zeros(1, 1, cut.q.units, cut.k.units, dtype=torch.bool, device=keep.device)
    mask[:, :, cut.q.grid] = True  # the text's columns; its rows are computed in any case and need no score
    mask[..., cut.q.grid[:, None], cut.k.grid] = keep
    return from_units(mask, cut).branches[0].run(Operands(scene.q, scene.k, v, scene.scale, scene.bias))[1]
