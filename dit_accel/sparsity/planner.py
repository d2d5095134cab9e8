"""Axis 4, reuse, and when a recipe applies at all: from an attention call to its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..call import AttentionCall, Site
from ..config import AgentSelect, DiskSelect, NeighborhoodSelect, Profile, Recipe, ResidualCorrect
from ..errors import PlanError
from ..layout import TokenLayout
from ..step import StepInfo
from .agents import agent_plan
from .correct import Missing, corrected, residual
from .crossover import slower_reason
from .cut import Cut
from .decide import Decision, decide, grid_share, tiling_for
from .drift import Probe, look
from .exact import exact_plan
from .expected import calibration_note, floor_note, joined, plan_note
from .inputs import Inputs, Warm
from .plan import PackedPlan, Plan, from_units
from .profiled import Profiled
from .state import state_bytes

STATE_LIMIT = 8 << 30  # bytes of decisions kept between steps
LAYOUT_LIMIT = 8  # geometric plans kept
MASKED = "faithful: text holds padding here, so it is kept, not ranked"


@dataclass(frozen=True)
class _Kept:
    """What one site and branch remembers: its last decision, by which recipe, and where the next one may start."""

    recipe: Recipe
    step: int
    layout: TokenLayout
    shape: tuple[int, ...]
    device: torch.device
    plan: PackedPlan | None = None
    warm: Warm | None = None
    missing: Missing | None = None
    probe: Probe | None = None

    @property
    def nbytes(self) -> int:
        parts = (self.plan, self.warm, self.missing, self.probe)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class _Fixed:
    """A plan that depends on the layout alone, and what it was made from where a correction needs that."""

    plan: Plan
    cut: Cut
    mask: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes


class Planner:
    """Decide plans for one recipe and remember them within a run.

    Geometric plans depend on the layout alone and are shared by all sites. Content-driven plans are kept per
    (site, guidance branch) as bitmaps, with one row a sample; a new run drops them all. With a `profile` heads follow
    what a calibration found.
    """

    def __init__(self, recipe: Recipe, profile: Profile | None = None) -> None:
        self.recipe = recipe
        self._bare = recipe.model_copy(update={"search": None})  # it would be hashed at every call
        self._profiled = None if profile is None else Profiled(self._bare, profile)
        self._fixed: dict[tuple[Recipe, TokenLayout, torch.device], _Fixed] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._missing: dict[tuple[str, str], _Kept] = {}
        self._run: int | None = None

    def clear(self) -> None:
        """Forget everything that was decided."""
        self._fixed.clear()
        self._forget_run()

    def _forget_run(self) -> None:
        self._kept.clear()
        self._missing.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        parts = (*self._kept.values(), *self._missing.values(), *self._fixed.values())
        return sum(part.nbytes for part in parts)

    def dense_reason(self, site: Site, step: StepInfo, layout: TokenLayout, device: torch.device) -> str:
        """Say why the recipe leaves a call dense before its queries are known, '' if it does not.

        `device`, where the call runs, tells which measured table applies.
        """
        recipe = self.recipe
        if site.index < recipe.dense_layers:
            return f"first {recipe.dense_layers} layers stay dense"
        if step.index is None or step.total is None:
            if recipe.dense_steps or recipe.stateful or recipe.cases or self._profiled is not None:
                return step.reason
        else:
            first = first_sparse(step.total, recipe.dense_steps)
            if step.index < first:
                return f"first {first} of {step.total} steps stay dense"
        here = self.recipe_at(site, step)
        if here.density == 1:
            return "density 1 is dense"
        if here.select.kind == "all" and here.heads is None:
            return "the recipe computes every pair here"
        if here.heads is not None and here.heads.full:
            return "all heads compute everything here"
        return slower_reason(layout.length, here.density, device) if recipe.adaptive else ""

    def plan(self, call: AttentionCall) -> Plan:
        """Return the plan of a call that `dense_reason` let through."""
        if call.step.run != self._run:
            self._forget_run()
            self._run = call.step.run
        recipe = self.recipe_at(call.site, call.step)
        if not recipe.ranks_text:
            return self._made(recipe, call)
        if call.key_bias is not None:
            made = self._made(_keeping_text(recipe), call)
            return replace(made, note=joined(made.note, MASKED))
        return self._made(recipe, replace(call, layout=call.layout.with_text_ranked))

    def _made(self, recipe: Recipe, call: AttentionCall) -> Plan:
        made = self._by_content(recipe, call) if recipe.content_driven else self._geometric(recipe, call)
        return made if made.precision == recipe.precision else replace(made, precision=recipe.precision)

    def recipe_at(self, site: Site, step: StepInfo) -> Recipe:
        """Return the recipe as it is at one site and step: its cases settled, and what a profile says of heads."""
        share = step.index / step.total if step.index is not None and step.total else 0.0
        if self._profiled is not None:
            return self._profiled.at(site, share)
        return self._bare.at(site.index, site.count, share)

    # -- by place alone ---------------------------------------------------------------------------------------------
    def _geometric(self, recipe: Recipe, call: AttentionCall) -> Plan:
        key = (recipe, call.layout, call.q.device)
        if key not in self._fixed:
            while len(self._fixed) >= LAYOUT_LIMIT:
                del self._fixed[next(iter(self._fixed))]  # the oldest
            self._fixed[key] = _fixed(recipe, call)
        fixed = self._fixed[key]
        return self._corrected(recipe, call, fixed.plan, fixed.cut, lambda: fixed.mask)

    # -- by content -------------------------------------------------------------------------------------------------
    def _by_content(self, recipe: Recipe, call: AttentionCall) -> Plan:
        key = (_decider(recipe, call.site), call.step.branch)
        kept = self._kept.get(key)
        if kept is not None and not self._fits(recipe, kept, call):
            kept = None
        if kept is not None and kept.probe is not None:
            kept = self._kept[key] = _followed(recipe, kept, kept.probe, call)
        if kept is not None and kept.plan is not None and self._still_good(recipe, kept, call):
            # what a correction makes of a kept cut is not kept with it, so that the state stays what was declared
            bits = kept.plan.bits
            return self._corrected(recipe, call, kept.plan.expand(), kept.plan.cut.at_rest(), lambda: bits)
        inputs = _inputs(call, kept.warm if kept else None)
        decision = decide(recipe, inputs)
        note = plan_note(recipe, call.layout, call.q.shape[2])
        if recipe.stateful and call.step.index is not None:
            self._keep(recipe, key, call, decision, note)
        plan = replace(from_units(decision.mask, decision.cut, decision.skip_heads), note=note)
        return self._corrected(recipe, call, plan, decision.cut, lambda: decision.mask)

    # -- corrections ------------------------------------------------------------------------------------------------
    def _corrected(
        self, recipe: Recipe, call: AttentionCall, plan: Plan, cut: Cut, mask: Callable[[], torch.Tensor]
    ) -> Plan:
        if recipe.correct is None:
            return plan
        if not isinstance(recipe.correct, ResidualCorrect):
            return corrected(plan, recipe.correct, cut, mask(), _inputs(call))
        key, now = (call.site.name, call.step.branch), call.step.index or 0
        kept = self._missing.get(key)
        if (
            kept is None
            or not self._fits(recipe, kept, call)
            or kept.missing is None
            or now - kept.step >= recipe.correct.every
        ):
            self._make_room(recipe, call, kept)
            missing = Missing(now)
            shape = tuple(call.q.shape)
            self._missing[key] = _Kept(recipe, now, call.layout, shape, call.q.device, missing=missing)
            return residual(plan, recipe.correct, cut, missing, measure=True)
        return residual(plan, recipe.correct, cut, kept.missing, measure=False)

    # -- what is kept -----------------------------------------------------------------------------------------------
    def _fits(self, recipe: Recipe, kept: _Kept, call: AttentionCall) -> bool:
        """Say whether what is kept belongs to calls like this one, and to what is asked of it here and now."""
        same = (kept.layout, kept.shape, kept.device) == (call.layout, call.q.shape, call.q.device)
        asked = kept.recipe is recipe or kept.recipe == recipe  # comparing settings takes longer than all the rest
        return same and asked and (call.step.index is None or call.step.index >= kept.step)

    def _still_good(self, recipe: Recipe, kept: _Kept, call: AttentionCall) -> bool:
        now = call.step.index if call.step.index is not None else kept.step
        if recipe.drift is not None:
            return True
        if recipe.decide_at:
            total = call.step.total or 0
            return not any(kept.step < round(share * total) <= now for share in recipe.decide_at)
        return now - kept.step < recipe.every

    def _keep(self, recipe: Recipe, key: tuple[str, str], call: AttentionCall, decision: Decision, note: str) -> None:
        self._make_room(recipe, call, self._kept.get(key))
        assert call.step.index is not None
        packed = None
        if recipe.reuses:
            packed = PackedPlan.pack(decision.mask, decision.cut.at_rest(), note, decision.skip_heads)
        probe = None if recipe.drift is None else Probe(look(call.layout, call.q, call.k))
        shape = tuple(call.q.shape)
        self._kept[key] = _Kept(
            recipe, call.step.index, call.layout, shape, call.q.device, packed, decision.warm, probe=probe
        )

    def _make_room(self, recipe: Recipe, call: AttentionCall, before: _Kept | None) -> None:
        """Raise PlanError when what a call is about to keep, in place of what it kept before, goes over the limit."""
        b, _, h, d = call.q.shape
        expected = state_bytes(recipe, call.layout, b, h, d, call.q.element_size())
        if self.nbytes - (before.nbytes if before else 0) + expected > STATE_LIMIT:
            raise PlanError(
                f"recipe {self.recipe.name!r} would keep more than {STATE_LIMIT >> 30} GiB between steps; "
                "use every=1, larger tiles, another correction or a smaller size."
            )


def _followed(recipe: Recipe, kept: _Kept, probe: Probe, call: AttentionCall) -> _Kept:
    """Decide again for the samples that had moved too far at the call before, and measure all of them anew."""
    assert recipe.drift is not None
    assert kept.plan is not None
    now, stale = look(call.layout, call.q, call.k), probe.stale()
    if stale:
        at = torch.tensor(stale, device=call.q.device)
        bias = call.key_bias if call.key_bias is None or call.key_bias.shape[0] == 1 else call.key_bias[at]
        inputs = Inputs(call.layout, call.q[at], call.k[at], call.v[at], call.scale, bias)
        decision = decide(recipe, inputs)
        fresh = PackedPlan.pack(decision.mask, decision.cut)
        bits = kept.plan.bits.index_copy(0, at, fresh.bits)
        probe = Probe(probe.seen.index_copy(0, at, now[at]))
        kept = replace(kept, plan=replace(kept.plan, bits=bits), probe=probe)
    probe.measure(now, recipe.drift)
    return kept


@lru_cache(maxsize=256)
def _keeping_text(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"faithful": False})


def first_sparse(total: int, dense_steps: float) -> int:
    """Return the first step of a run that a recipe with a share of dense steps may run sparse."""
    return int(dense_steps * total + 0.5)


def _decider(recipe: Recipe, site: Site) -> str:
    """Name the site whose decision this one takes over: the last of `decide_layers` up to it, or itself."""
    before = [layer for layer in recipe.decide_layers if layer <= site.index]
    return f"{site.model}layer {max(before)}" if before else site.name


def _inputs(call: AttentionCall, warm: Warm | None = None) -> Inputs:
    return Inputs(call.layout, call.q, call.k, call.v, call.scale, call.key_bias, warm)


def _fixed(recipe: Recipe, call: AttentionCall) -> _Fixed:
    """Make a plan from the layout alone."""
    tiling, device = tiling_for(recipe, call.layout), call.q.device
    cut, select, note = tiling.on(device).cut, recipe.select, floor_note(recipe, call.layout, call.q.shape[2])
    share, mask = None if select.asked is None else grid_share(call.layout, select.asked), torch.empty(0, device=device)
    if isinstance(select, AgentSelect):
        plan = agent_plan(tiling, select, share or 0.0, device)
    elif isinstance(select, DiskSelect) or (isinstance(select, NeighborhoodSelect) and select.per == "token"):
        plan = exact_plan(tiling, select, share, device)
    else:
        mask = decide(recipe, _inputs(call)).mask
        plan = from_units(mask, cut)
    note = joined(note or _shape_note(recipe, plan), calibration_note(recipe))
    return _Fixed(replace(plan, note=note), cut, mask)


def _shape_note(recipe: Recipe, plan: Plan) -> str:
    """Say in plain words when a rule of places has no size near the asked density on this grid; once a layout."""
    got = float(plan.density())
    if recipe.density is None or abs(got / recipe.density - 1) <= 0.2:
        return ""
    return f"asked density {recipe.density:g}: the nearest size that {recipe.name!r} has on this grid takes {got:.2f}"
