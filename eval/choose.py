"""`dit-accel choose`: from the rows of a study to mixtures of its recipes, one recipe with cases for each density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.config import MAPPED, AllSelect, Case, Choice, Mixtures, Recipe, build
from dit_accel.config.recipe import asked_density
from dit_accel.errors import ConfigError
from dit_accel.output import check_writable

from .cells import Group, Mixed, Option, Span, best_mix, cheapest, groups_of, uniform
from .store import Row, Setup, load
from .summary import Interval, Standing, by_candidate, paired, standings
from .tables import best_of

if TYPE_CHECKING:
    import rich.table

SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Proposal:
    """What was chosen for one density, and how it came to it.

    `single`: the best single recipe of the rows. `ahead`: by how many dB the mixture was ahead of it where the rows
    hold the mixture too, None where they do not; one that was not ahead has been given up for the single recipe.
    """

    recipe: Recipe
    mixed: Mixed
    single: str | None
    ahead: Interval | None

    @property
    def status(self) -> str:
        """Say in words whether it is a mixture, and whether it has been tried."""
        names = {pick.name for course in self.mixed.courses for pick in course.picks}
        if self.ahead is not None:
            kept = "" if self.ahead.mean > 0 else ", so that is kept"
            return f"tried: {self.ahead.mean:+.2f} dB against {self.single}{kept}"
        return "one recipe" if len(names) == 1 else "not tried yet"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, without the recipe's settings."""
        return {
            "total": self.recipe.total,
            "expected": self.mixed.cost,
            "expected_error": self.mixed.loss**0.5,
            "status": self.status,
            "parts": _parts(self.recipe),
        }


@dataclass(frozen=True)
class Chosen:
    """Mixtures, how each came about, and whether what was made least tells anything about pictures.

    `agreement`: Spearman's rank correlation of loss and mean squared pixel error over the single candidates; None for
    fewer than three.
    """

    mixtures: Mixtures
    proposals: tuple[Proposal, ...]
    agreement: float | None

    @classmethod
    def of(cls, rows: Path, densities: Sequence[float], name: str, groups: int, windows: int) -> Chosen:
        """Choose from a study's rows for some densities; if none is named, for all asked there that can be met.

        The budget at a density is what the best single recipe there computes, where that is a little more. A mixture
        that the rows hold already, because it was chosen and run before, has to have been ahead of that recipe. Raises
        ConfigError where the rows hold nothing to choose from, or nothing cheap enough.
        """
        setup, found = load(rows)
        ran = by_candidate(found)
        usable = {name: group for name, group in ran.items() if _is_usable(group)}
        if not usable:
            raise ConfigError(f"{rows}: no recipe with a density was looked into, so there is nothing to choose from.")
        lines = standings([row for group in usable.values() for row in group], (), setup)
        parts = groups_of(usable, setup, groups, windows)
        asked = {line.asked for line in lines if line.asked is not None}
        singles = {d: best_of([line for line in lines if line.asked == d]) for d in asked}
        budgets = {d: max(d, line.spent or d) for d, line in singles.items() if line is not None}
        least = cheapest(parts)
        named = {asked_density(density, "choose") for density in densities}
        wanted = sorted(named or (d for d, budget in budgets.items() if budget >= least), reverse=True)
        if not wanted:
            raise ConfigError(
                f"{rows}: the cheapest choices measured take {least:.3f}, more than any recipe there was asked for; "
                "name a density of at least that."
            )
        choice = Choice(
            model=setup.model,
            described=_described(setup),
            prompts=tuple(dict.fromkeys(row.prompt for group in usable.values() for row in group)),
            candidates=tuple(usable),
            best=tuple(line.candidate for d in wanted if (line := singles.get(d)) is not None),
        )
        proposals = tuple(_propose(parts, ran, d, budgets.get(d, d), singles.get(d), name, choice) for d in wanted)
        data = {"name": name, "chosen": choice, "recipes": tuple(one.recipe for one in proposals)}
        mixtures = build(Mixtures, data, "choose")
        return cls(mixtures, proposals, _agreement(parts, lines))

    def to_dict(self) -> dict[str, Any]:
        """Return what was chosen, without the settings of each recipe, as plain data."""
        return {
            "name": self.mixtures.name,
            "chosen": self.mixtures.chosen.model_dump(mode="json"),
            "agreement": self.agreement,
            "mixtures": [one.to_dict() for one in self.proposals],
        }

    def table(self) -> rich.table.Table:
        """Return what was chosen where, for a terminal."""
        from rich import box
        from rich.table import Table

        known = self.agreement is not None
        said = f"rank correlation of loss and picture over single recipes: {self.agreement:.3f}" if known else None
        title = f"{self.mixtures.name}: chosen on {self.mixtures.chosen.model}"
        page = Table(title=title, caption=said, box=box.SIMPLE)
        for heading in ("density", "expected", "error", "depth", "steps", "choice", "status"):
            page.add_column(heading, justify="right" if heading in ("expected", "error") else "left")
        for one in self.proposals:
            head = (f"{one.recipe.total:g}", f"{one.mixed.cost:.3f}", f"{one.mixed.loss**0.5:.3f}")
            for i, part in enumerate(_parts(one.recipe)):
                first = i == 0
                row = (*(head if first else ("", "", "")), part["depth"], part["steps"], part["choice"])
                page.add_row(*row, one.status if first else "")
            page.add_section()
        return page


def _propose(
    parts: Sequence[Group],
    ran: Mapping[str, Sequence[Row]],
    density: float,
    budget: float,
    single: Standing | None,
    name: str,
    choice: Choice,
) -> Proposal:
    """Choose for one density; where that very mixture ran and was not ahead of the best single recipe, take that."""
    mixed = best_mix(parts, budget)
    recipe = as_recipe(mixed, density, name, choice)
    known = recipe.model_dump(mode="json")["cases"]
    tried = next((rows for rows in ran.values() if rows[0].definition.get("cases") == known), None)
    if tried is None or single is None:
        return Proposal(recipe, mixed, None if single is None else single.candidate, None)
    ahead = paired(tried, ran[single.candidate])
    alone = uniform(parts).get(single.candidate)
    if ahead is not None and ahead.mean <= 0 and alone is not None:
        recipe, mixed = as_recipe(alone, density, name, choice), alone
    return Proposal(recipe, mixed, single.candidate, ahead)


def as_recipe(mixed: Mixed, total: float, name: str, chosen: Choice) -> Recipe:
    """Write picks as one recipe whose cases say which choice holds where; elsewhere everything is computed."""
    cases = tuple(case for span, pick in _merged(mixed) for case in _cases(*span, pick))
    names = [pick.name.rpartition("@")[0] or pick.name for course in mixed.courses for pick in course.picks]
    parts = ", ".join(dict.fromkeys(names))
    source = f"mixture of {parts} ({chosen.described}, prompts: {len(chosen.prompts)}), chosen on {chosen.model}"
    data = {"name": name, "select": AllSelect(), "cases": cases, "total": total, "sources": (source,)}
    return build(Recipe, data, "choose")


def check_target(path: Path, force: bool) -> None:
    """Refuse a name that is no JSON or YAML file, cannot be written or, unless forced, is taken. Raises ConfigError."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output {path}: mixtures are a {' or '.join(SUFFIXES)} file.")
    check_writable(path, force)


def _is_usable(rows: Sequence[Row]) -> bool:
    """Say whether rows are of a single recipe at a density, not calibrated for one model, and were looked into."""
    first = rows[0]
    single = not {"total", "profile"} & {key for key, value in first.definition.items() if value is not None}
    known = first.family == "recipe" and first.asked is not None
    return single and known and any(row.samples for row in rows) and any(row.map for row in rows)


def _agreement(parts: Sequence[Group], lines: Sequence[Standing]) -> float | None:
    """Return the rank correlation between what is minimised and how far pictures are from the reference."""
    from torchmetrics.functional.regression import spearman_corrcoef

    losses = {name: mixed.loss for name, mixed in uniform(parts).items()}
    known = [line for line in lines if "psnr" in line.figures and line.candidate in losses]
    if len(known) < 3:
        return None
    lost = torch.tensor([losses[line.candidate] for line in known])
    unlike = torch.tensor([-line.figures["psnr"].mean for line in known])
    ranked = float(spearman_corrcoef(lost, unlike))
    return ranked if math.isfinite(ranked) else None


def _merged(mixed: Mixed) -> list[tuple[tuple[Span, Span], Option]]:
    """Join parts of one choice: first windows that follow each other, then groups that do."""
    joined: list[tuple[Span, list[tuple[Span, Option]]]] = []
    for course in mixed.courses:
        runs: list[tuple[Span, Option]] = []
        for cell, pick in zip(course.group.cells, course.picks, strict=True):
            if runs and runs[-1][1].name == pick.name:
                runs[-1] = ((runs[-1][0][0], cell.steps[1]), pick)
            else:
                runs.append((cell.steps, pick))
        depth = course.group.depth
        if joined and [(s, o.name) for s, o in joined[-1][1]] == [(s, o.name) for s, o in runs]:
            joined[-1] = ((joined[-1][0][0], depth[1]), runs)
        else:
            joined.append((depth, runs))
    return [((depth, steps), pick) for depth, runs in joined for steps, pick in runs]


def _cases(depth: Span, steps: Span, pick: Option) -> list[Case]:
    """Return the cases that put a choice in its place, with those that its recipe has of its own."""
    if pick.recipe is None:
        return [Case(name=pick.name, depth=depth, steps=steps, select=AllSelect())]
    own = [_within(case, depth, steps, pick.name) for case in pick.recipe.cases]
    whole = Case(name=pick.name, depth=depth, steps=steps, **_settings(pick.recipe))
    return [whole, *(case for case in own if case is not None)]


def _settings(recipe: Recipe) -> dict[str, Any]:
    if recipe.drift is not None:
        raise ConfigError(f"recipe {recipe.name!r}: decides by drift, which a part of a mixture cannot.")
    return {name: value for name in MAPPED if (value := getattr(recipe, name)) is not None}


def _within(case: Case, depth: Span, steps: Span, name: str) -> Case | None:
    """Return a recipe's own case where it and the cell overlap."""
    spans = {"depth": _overlap(case.depth, depth), "steps": _overlap(case.steps, steps)}
    if any(low >= high for low, high in spans.values()):
        return None
    return case.model_copy(update={**spans, "name": name})


def _overlap(a: Span | None, b: Span) -> Span:
    return b if a is None else (max(a[0], b[0]), min(a[1], b[1]))


def _parts(recipe: Recipe) -> list[dict[str, str]]:
    """Say in words which choice holds where, cases of one choice and place once."""
    said = [(_percent(case.depth), _percent(case.steps), case.name or "") for case in recipe.cases]
    return [{"depth": d, "steps": s, "choice": c} for d, s, c in dict.fromkeys(said)]


def _percent(span: Span | None) -> str:
    return "all" if span is None else f"{span[0]:.0%} to {span[1]:.0%}"


def _described(setup: Setup) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in setup.settings.items() if value is not None)
    return f"{settings}, first {setup.dense_steps:.0%} of the steps dense, {setup.dtype} on {setup.device}"
