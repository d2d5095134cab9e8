"""Axis 2 by exact mass with kept log-sum-exps: one pass over the keys instead of two, from the second decision on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.block_mass import block_mass_and_lse
from .scores import Scene, runs_of


@dataclass(frozen=True, eq=False)
class Reference:
    """The log-sum-exps of the grid's queries at a run's first decision, float32 [B, H, units, slots of a unit]."""

    lse: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.lse.numel() * self.lse.element_size()


def score(scene: Scene, before: Reference | None) -> tuple[torch.Tensor, Reference]:
    """Return the sums of exp(q k - lse) over a key unit's keys, averaged over a query unit's queries, and those lse.

    AdaSpa, Xia et al. 2025, arXiv 2502.21079: a first search finds the log-sum-exps of full attention and sums in a
    second pass, a later one reuses them. Without `before` the sums are the exact attention, text included.
    """
    tiling, device = scene.tiling, scene.q.device
    asking, unit = runs_of(tiling, tiling.unit, device).slots, tiling.unit
    start = None if before is None else before.lse.flatten(2)
    sums, lse = block_mass_and_lse(
        scene.q, scene.k, asking, tiling.on(device).slots, unit, scene.scale, scene.bias, start
    )
    return scene.cut.k.on_grid(sums, 3), before or Reference(lse.unflatten(2, (-1, unit)))
