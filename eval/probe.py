"""What attention calls are watched for: density by step and site, and the quality of sampled calls."""

from __future__ import annotations

from collections import defaultdict

import torch

from dit_accel.acceleration import Acceleration
from dit_accel.call import AttentionCall
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.planner import first_sparse
from dit_accel.truth import quality

from .store import DensityMap, Sample

LOOKS = 6  # steps at which calls are looked at


class DensityWatch:
    """Note the density of every planned call; read from the device only when the map is asked for."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)

    def __call__(self, call: AttentionCall, plan: Plan, out: torch.Tensor) -> None:
        if call.step.index is not None:
            self._seen[call.step.index, call.site.name].append(plan.density())

    def map(self, handle: Acceleration, steps: int) -> DensityMap:
        """Return the map over all sites and steps; calls that were not planned were dense and count 1."""
        sites = tuple(site.name for site in handle.sites)
        rows = tuple(tuple(self._mean((step, site)) for site in sites) for step in range(steps))
        return DensityMap(sites=sites, density=rows)

    def _mean(self, key: tuple[int, str]) -> float:
        seen = self._seen.get(key)
        return round(float(torch.stack([d.float().cpu() for d in seen]).mean()), 5) if seen else 1.0


def looked_at(total: int, dense_steps: float) -> list[int]:
    """Return the steps at which calls are looked at: the middles of equal parts of those that may run sparse."""
    first = first_sparse(total, dense_steps)
    return sorted({int(first + (part + 0.5) * (total - first) / LOOKS) for part in range(LOOKS)})


class QualityWatch:
    """Measure recall, best recall and output error of the calls of a few steps, at every site and branch."""

    def __init__(self, dense_steps: float) -> None:
        self.samples: list[Sample] = []
        self._dense_steps = dense_steps

    def __call__(self, call: AttentionCall, plan: Plan, out: torch.Tensor) -> None:
        index, total = call.step.index, call.step.total
        if index is None or total is None or index not in looked_at(total, self._dense_steps):
            return
        seen = quality(call, plan, out)
        self.samples.append(
            Sample(
                step=index,
                site=call.site.name,
                density=float(plan.density()),
                recall=seen.recall,
                best_recall=seen.best_recall,
                error=seen.error,
            )
        )
