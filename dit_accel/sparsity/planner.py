"""Axis 4, reuse, and when a recipe applies at all: from an attention call to its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..call import AttentionCall, Site
from ..config import Recipe
from ..errors import PlanError
from ..layout import TokenLayout
from ..step import StepInfo
from .crossover import slower_reason
from .decide import decide, floor_note, state_bytes, tiling_for
from .plan import PackedPlan, Plan, from_units

STATE_LIMIT = 8 << 30  # bytes of plans kept between steps
LAYOUT_LIMIT = 8  # geometric plans kept


@dataclass(frozen=True)
class _Kept:
    step: int
    layout: TokenLayout
    shape: tuple[int, ...]
    device: torch.device
    plan: PackedPlan


class Planner:
    """Decide plans for one recipe and remember them within a run.

    Geometric plans depend on the layout alone and are shared by all sites. Content-driven plans are kept per
    (site, guidance branch) as bitmaps, with one row a sample; a new run drops them all.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._fixed: dict[tuple[TokenLayout, torch.device], Plan] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._run: int | None = None

    def clear(self) -> None:
        """Forget everything that was decided."""
        self._fixed.clear()
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        return sum(kept.plan.nbytes for kept in self._kept.values()) + sum(p.nbytes for p in self._fixed.values())

    def dense_reason(self, site: Site, step: StepInfo, layout: TokenLayout, x: torch.Tensor) -> str:
        """Say why the recipe leaves a call dense before its queries are known, '' if it does not.

        `x` is any tensor of the call: its device tells which measured table applies.
        """
        recipe = self.recipe
        if recipe.density == 1:
            return "density 1 is dense"
        if site.index < recipe.dense_layers:
            return f"first {recipe.dense_layers} layers stay dense"
        if step.index is None or step.total is None:
            return step.reason if recipe.dense_steps or recipe.every > 1 else ""
        first = int(recipe.dense_steps * step.total + 0.5)
        if step.index < first:
            return f"first {first} of {step.total} steps stay dense"
        return slower_reason(layout.length, recipe.density, x.device) if recipe.adaptive else ""

    def plan(self, call: AttentionCall) -> Plan:
        """Return the plan of a call that `dense_reason` let through."""
        if not self.recipe.content_driven:
            return self._geometric(call.layout, call.q.device)
        return self._by_content(call)

    def _geometric(self, layout: TokenLayout, device: torch.device) -> Plan:
        key = (layout, device)
        if key not in self._fixed:
            while len(self._fixed) >= LAYOUT_LIMIT:
                del self._fixed[next(iter(self._fixed))]  # the oldest
            tiling = tiling_for(self.recipe, layout)
            nothing = torch.empty(0, device=device)
            plan = from_units(decide(self.recipe, tiling, nothing, nothing, 1.0), tiling)
            self._fixed[key] = replace(plan, note=floor_note(self.recipe, layout))
        return self._fixed[key]

    def _by_content(self, call: AttentionCall) -> Plan:
        if call.step.run != self._run:
            self._kept.clear()
            self._run = call.step.run
        key = (call.site.name, call.step.branch)
        kept = self._kept.get(key)
        if kept is not None and self._still_good(kept, call):
            return kept.plan.expand()
        tiling = tiling_for(self.recipe, call.layout)
        mask = decide(self.recipe, tiling, call.q, call.k, call.scale)
        note = floor_note(self.recipe, call.layout)
        if self.recipe.every > 1 and call.step.index is not None:
            self._keep(key, call, PackedPlan.pack(mask, tiling, note))
        return replace(from_units(mask, tiling), note=note)

    def _still_good(self, kept: _Kept, call: AttentionCall) -> bool:
        age = (call.step.index if call.step.index is not None else kept.step) - kept.step
        same = (kept.layout, kept.shape, kept.device) == (call.layout, call.q.shape, call.q.device)
        return same and 0 <= age < self.recipe.every

    def _keep(self, key: tuple[str, str], call: AttentionCall, packed: PackedPlan) -> None:
        expected = state_bytes(self.recipe, call.layout, call.q.shape[0], call.q.shape[2])
        if self.nbytes + expected > STATE_LIMIT:
            raise PlanError(
                f"recipe {self.recipe.name!r} would keep more than {STATE_LIMIT >> 30} GiB of plans between steps; "
                "use every=1, larger tiles or a smaller size."
            )
        assert call.step.index is not None
        self._kept[key] = _Kept(call.step.index, call.layout, tuple(call.q.shape), call.q.device, packed)
