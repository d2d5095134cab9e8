"""Axis 2 by exact mass with kept log-sum-exps: one pass over the keys instead of two, from the second decision on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .scores import Scene, products


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
    uploaded, length = scene.tiling.on(scene.q.device), scene.k.shape[1]
    unit = scene.cut.k.unit_of_token(length)[0, 0]
    gather = torch.zeros(length, scene.tiling.units, device=unit.device).scatter_(1, unit[:, None], 1.0)
    gather = gather[:, uploaded.grid_units]
    sums, kept, done = [], [], 0
    for logits, real in products(scene, scene.q, scene.k, scene.scale):
        if scene.bias is not None:
            logits = logits + scene.bias[:, :, None, None]
        here = logits.logsumexp(-1) if before is None else before.lse[:, :, done : done + len(real)]
        share = (logits - here[..., None]).exp() @ gather
        sums.append((share * real[..., None]).sum(3) / real.sum(-1)[:, None])
        kept.append(here)
        done += len(real)
    return torch.cat(sums, 2), before or Reference(torch.cat(kept, 2))
