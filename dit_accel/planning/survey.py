"""What the engine will do with each attention: it walks a twin on no device, where nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..attachment import Attachment
from ..call import AttentionCall, Site
from ..config import Recipe, ResidualCorrect
from ..engine import Engine
from ..errors import UnsupportedError
from ..hosts import Family, LayoutUnknownError
from ..kernels.choice import prefer
from ..layout import TokenLayout
from ..sparsity.correct import MEASURES
from ..sparsity.expected import budget_density, plan_note
from ..sparsity.plan import Plan
from ..sparsity.planner import Planner
from ..step import StepInfo, StepTracker
from .inputs import Arguments
from .models import META
from .work import Work, count


@dataclass(frozen=True)
class Reached:
    """An attention call that reaches the engine: layout, heads and head dimension."""

    layout: TokenLayout
    batch: int
    heads: int
    dim: int


@dataclass(frozen=True)
class Survey:
    """One transformer's sites, as the engine meets them.

    `layout` of the whole sequence, None with the `unknown` reason. `reached`: site -> its calls. `stock`: site -> why a
    call never reaches the engine. `blocked`: site -> why it cannot be accelerated at all. `work` of a forward as it
    comes, `ours` of one in which all sites but the blocked are run by the engine. `text_bytes`: the prompt's keys and
    values that are kept for cross-attentions.
    """

    sites: Sequence[Site]
    layout: TokenLayout | None
    unknown: str
    reached: Mapping[str, tuple[Reached, ...]]
    stock: Mapping[str, tuple[str, ...]]
    blocked: Mapping[str, str]
    work: Work
    ours: Work
    text_bytes: int


@dataclass(frozen=True)
class Treatment:
    """What happens to the calls of one site at one step: `density` expected, None where the attention decides it.

    `reason` says why a call is dense, '' where it is sparse. `recipe` is the one in force there.
    """

    site: Site
    step: int
    call: Reached | None
    reason: str
    recipe: Recipe
    density: float | None = 1.0


class _Notes(Planner):
    """A planner that lets every call through, writes it down, and has it run dense."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.reached: dict[str, tuple[Reached, ...]] = {}

    def dense_reason(self, site: Site, step: StepInfo, layout: TokenLayout, device: torch.device) -> str:
        return ""

    def plan(self, call: AttentionCall) -> Plan:
        batch, queries, heads, dim = call.q.shape
        seen = Reached(call.layout, batch, heads, dim)
        self.reached[call.site.name] = (*self.reached.get(call.site.name, ()), seen)
        return Plan(queries, call.k.shape[1])


@torch.no_grad()
def survey(given: torch.nn.Module, model: Any, family: Family, recipe: Recipe, arguments: Arguments) -> Survey:
    """Find the sites of a transformer as `accelerate` would, and walk its twin `model` on the meta device.

    `given` is the transformer itself, which is only looked at; `arguments` are those of its forward, on the CPU, where
    their values can be read.
    """
    blocked = _attachment(given, family, recipe).blocked
    layout, unknown = None, ""
    try:
        layout = family.geometry(model, arguments, {})
    except LayoutUnknownError as error:
        unknown = str(error)

    def known(*_: Any) -> TokenLayout:
        if layout is None:
            raise LayoutUnknownError(unknown)
        return layout

    # on no device the values that say the layout cannot be read, so it is told; and no prompt could be kept
    attachment = _attachment(model, replace(family, geometry=known, cross=None), recipe)
    planner = attachment.engine.planner = _Notes(recipe)
    stock: dict[str, tuple[str, ...]] = {}

    def note(site: Site, step: StepInfo, reason: str, _: TokenLayout | None) -> None:
        if reason != _EVERY_PAIR:
            stock[site.name] = (*stock.get(site.name, ()), reason)

    attachment.engine.ledger.listeners = (note,)
    on_meta = _moved(arguments)
    work = count(model, on_meta, attachment.sites)
    for name, why in blocked.items():
        attachment.blocked.setdefault(name, why)
    attachment.attach()
    try:
        with prefer("triton"):  # norms and rotations pass as they do on a GPU
            ours = count(model, on_meta, attachment.sites)
    finally:
        attachment.detach()
    kept = _text_bytes(model, family, arguments)
    return Survey(attachment.sites, layout, unknown, planner.reached, stock, blocked, work, ours, kept)


_EVERY_PAIR = "the plan holds every pair"  # what the ledger writes of a dense plan, which is how `_Notes` runs a call


def _text_bytes(model: torch.nn.Module, family: Family, arguments: Arguments) -> int:
    """Return the bytes of all cross-attentions' keys and values of the prompt, which `TextKV` keeps for a run."""
    total = 0
    for name, projection in (("encoder_hidden_states", "to_k"), ("encoder_hidden_states_image", "add_k_proj")):
        if name in arguments:
            words: torch.Tensor = arguments[name]
            widths = [getattr(site.module, projection).out_features for site in family.find_cross_sites(model)]
            total += 2 * words.shape[1] * sum(widths) * words.element_size()
    return total


def _attachment(model: torch.nn.Module, family: Family, recipe: Recipe) -> Attachment:
    tracker = StepTracker(None)
    tracker.set_manual(0, 1, "0")
    return Attachment(model, family, Engine(recipe), tracker, "")


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(META)
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    return type(value)(_moved(item) for item in value) if isinstance(value, (list, tuple)) else value


def treatments(seen: Survey, recipe: Recipe, steps: int, device: torch.device) -> list[Treatment]:
    """Ask the planner, step by step and site by site, what it does on `device`; sites in the model's order."""
    planner, found, measured = Planner(recipe), list[Treatment](), dict[str, int]()
    for index in range(steps):
        step = StepInfo(run=1, index=index, total=steps, branch="0")
        for site in seen.sites:
            here = planner.recipe_at(site, step)
            if site.name in seen.blocked:
                continue
            found += [Treatment(site, index, None, reason, here) for reason in seen.stock.get(site.name, ())]
            for call in seen.reached.get(site.name, ()):
                assert seen.layout is not None  # else the engine would have kept the call
                reason = planner.dense_reason(site, step, seen.layout, device)  # as hosts ask: of the whole sequence
                reason = reason or _measures(here, site, index, measured)
                density = 1.0 if reason else expected_density(here, call.layout, call.heads)
                found.append(Treatment(site, index, call, reason, here, density))
    return found


def _measures(recipe: Recipe, site: Site, step: int, last: dict[str, int]) -> str:
    """Say that a call is a full step from which a correction measures what is missing, '' if it is not."""
    if not isinstance(recipe.correct, ResidualCorrect):
        return ""
    if site.name in last and step - last[site.name] < recipe.correct.every:
        return ""
    last[site.name] = step
    return MEASURES


def expected_density(recipe: Recipe, layout: TokenLayout, heads: int) -> float | None:
    """Return the density of a sparse call: that of its very plan for rules of places, else what the budget says."""
    if recipe.content_driven:
        return budget_density(recipe, layout)
    return float(_by_place(recipe, layout, heads).density())


def plan_bytes(recipe: Recipe, layout: TokenLayout, heads: int) -> int:
    """Return the bytes of a plan by place, which all sites share; 0 where the content decides."""
    return 0 if recipe.content_driven else _by_place(recipe, layout, heads).nbytes


def notes(recipe: Recipe, layout: TokenLayout, heads: int) -> str:
    """Return what the engine's report will note of a sparse call, '' where nothing."""
    if recipe.content_driven:
        return plan_note(recipe, layout, heads)
    return _by_place(recipe, layout, heads).note


@lru_cache(maxsize=64)
def _by_place(recipe: Recipe, layout: TokenLayout, heads: int) -> Plan:
    """Make the plan of a rule that looks at the layout alone, for tensors of the right shape that hold one number."""
    x = torch.zeros(1).expand(1, layout.length, heads, 1)
    site, step = Site("planned", "planned", 0, torch.nn.Identity()), StepInfo(1, 0, 1, "0")
    alone = recipe.override(cases=(), correct=None)
    return Planner(alone).plan(AttentionCall(site, step, layout, x, x, x, 1.0, stock=_never))


def _never(*_: torch.Tensor) -> torch.Tensor:
    raise UnsupportedError("a planned call is not run")
