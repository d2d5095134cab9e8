"""What may be chosen in each part of model and run, from a study's rows, and the best choices within a budget.

The model is cut into groups of sites by depth, the run into windows of steps. In each window of each group every recipe
at every density that was run is an option, with what it computed there (from the rows' density maps) and how much it
erred there (from the calls that were looked at); computing everything is one too. Errors of one site add up over the
steps, errors of different sites do not: so the loss of a group is the square of its mean error over the windows, and
the loss of all is the mean over the groups. The best choice for a budget is a knapsack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dit_accel.config import Recipe, build
from dit_accel.errors import ConfigError
from dit_accel.sparsity.planner import first_sparse

from .store import Row, Setup

GRAIN = 10_000  # parts of the whole that costs are counted in
LEAST_GAIN = 0.1  # of the best single recipe's loss; a smaller promise is likely noise, and mixing not worth it
FULL = "dense"
Span = tuple[float, float]


@dataclass(frozen=True)
class Option:
    """What may be chosen in a cell; `recipe` None is everything. `cost` and `error` are means over the cell's calls.

    `cost`: computed over possible pairs. `error`: root mean square of the output's relative error.
    """

    name: str
    recipe: Recipe | None
    cost: float
    error: float


@dataclass(frozen=True)
class Cell:
    """One window of one group: its share of the run's steps, and what may be chosen there. `share` is of the group."""

    steps: Span
    share: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Group:
    """Some sites, those between two shares of all: their share of all calls, and their windows."""

    depth: Span
    share: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Course:
    """One option in each window of a group."""

    group: Group
    picks: tuple[Option, ...]

    @property
    def cost(self) -> float:
        """Computed over possible pairs, as a part of what all groups may compute."""
        parts = (cell.share * pick.cost for cell, pick in zip(self.group.cells, self.picks, strict=True))
        return self.group.share * sum(parts)

    @property
    def loss(self) -> float:
        """What the group adds to the loss of all."""
        parts = (cell.share * pick.error for cell, pick in zip(self.group.cells, self.picks, strict=True))
        return self.group.share * sum(parts) ** 2


@dataclass(frozen=True)
class Mixed:
    """A course for each group, and what they come to together."""

    courses: tuple[Course, ...]

    @property
    def cost(self) -> float:
        """Computed over possible pairs, of all calls that may run sparse."""
        return sum(course.cost for course in self.courses)

    @property
    def loss(self) -> float:
        """Mean over the groups of the squared mean error in time."""
        return sum(course.loss for course in self.courses)


def groups_of(candidates: Mapping[str, Sequence[Row]], setup: Setup, groups: int, windows: int) -> list[Group]:
    """Cut model and run, and say of each candidate what it computed and how it erred in each part.

    `candidates`: rows of recipes, by name, each with density maps and samples.
    """
    first = next(row.map for group in candidates.values() for row in group if row.map is not None)
    sites, steps = _depths(first.sites), len(first.density)
    start = first_sparse(steps, setup.dense_steps)
    out = []
    for low, high in _parts(0, groups, groups):
        here = [site for site, at in sites.items() if low / groups <= at < high / groups]
        if not here:
            continue
        cells = []
        for since, until in _parts(start, steps, windows):
            when = range(since, until)
            if when:
                found = (_option(name, rows, here, when) for name, rows in candidates.items())
                options = (Option(FULL, None, 1.0, 0.0), *(option for option in found if option is not None))
                span = (0.0 if since == start else since / steps, until / steps)
                cells.append(Cell(span, len(when) / (steps - start), options))
        out.append(Group((low / groups, high / groups), len(here) / len(sites), tuple(cells)))
    return out


def best_mix(groups: Sequence[Group], budget: float) -> Mixed:
    """Return the best courses within a budget, or one single recipe where mixing promises little more.

    Raises ConfigError where not even the cheapest choices fit.
    """
    mixed = knapsack(groups, budget)
    alone = [one for one in uniform(groups).values() if one.cost <= budget + 1 / GRAIN]
    best = min(alone, key=lambda one: one.loss, default=None)
    return best if best is not None and mixed.loss > (1 - LEAST_GAIN) * best.loss else mixed


def knapsack(groups: Sequence[Group], budget: float) -> Mixed:
    """Return the courses of least loss whose costs, each rounded to a grain, stay in the budget."""
    room = _grains(budget)
    least, front = np.zeros(room + 1), [courses(group) for group in groups]
    taken = np.zeros((len(groups), room + 1), dtype=np.int64)
    for at, found in enumerate(front):
        losses = np.full((len(found), room + 1), np.inf)
        for i, course in enumerate(found):
            cost = _grains(course.cost)
            if cost <= room:
                losses[i, cost:] = least[: room + 1 - cost] + course.loss
        taken[at], least = losses.argmin(0), losses.min(0)
    if not np.isfinite(least[room]):
        raise ConfigError(f"density {budget:g}: the cheapest choices measured take {cheapest(groups):.3f}.")
    picks: list[Course] = []
    for at in range(len(groups) - 1, -1, -1):
        picks.append(front[at][taken[at, room]])
        room -= _grains(picks[-1].cost)
    return Mixed(tuple(picks[::-1]))


def courses(group: Group) -> list[Course]:
    """Return the courses of a group that no other one beats in cost without losing in error, cheapest first."""
    front: list[tuple[float, float, tuple[Option, ...]]] = [(0.0, 0.0, ())]
    for cell in group.cells:
        front = _undominated(
            (cost + cell.share * option.cost, error + cell.share * option.error, (*picks, option))
            for cost, error, picks in front
            for option in cell.options
        )
    return [Course(group, picks) for _, _, picks in front]


def uniform(groups: Sequence[Group]) -> dict[str, Mixed]:
    """Return each candidate that may be chosen everywhere, chosen everywhere."""
    by_name = [[{option.name: option for option in cell.options} for cell in group.cells] for group in groups]
    everywhere = [name for name in by_name[0][0] if all(name in cell for cells in by_name for cell in cells)]

    def chosen(name: str) -> Mixed:
        picks = (tuple(cell[name] for cell in cells) for cells in by_name)
        return Mixed(tuple(Course(group, picked) for group, picked in zip(groups, picks, strict=True)))

    return {name: chosen(name) for name in everywhere}


def cheapest(groups: Sequence[Group]) -> float:
    """Return the least that any courses compute, over possible pairs."""
    return sum(min(course.cost for course in courses(group)) for group in groups)


def _option(name: str, rows: Sequence[Row], sites: Sequence[str], steps: Sequence[int]) -> Option | None:
    """Average a candidate over a cell; None where every call looked at ran in full though others did not."""
    maps = [row.map for row in rows if row.map is not None]
    at = [maps[0].sites.index(site) for site in sites]
    density = np.array([[[shown.density[step][i] for i in at] for step in steps] for shown in maps])
    seen = [sample for row in rows for sample in row.samples if sample.site in sites and sample.step in steps]
    errors = [sample.error**2 for sample in seen if sample.density < 1]
    sparse = float((density < 1).mean())
    if sparse and not errors:
        return None
    error = (sparse * float(np.mean(errors))) ** 0.5 if errors else 0.0
    return Option(name, build(Recipe, rows[0].definition, name), float(density.mean()), error)


def _undominated(
    found: Iterable[tuple[float, float, tuple[Option, ...]]],
) -> list[tuple[float, float, tuple[Option, ...]]]:
    """Keep, cheapest first, what errs less than everything cheaper."""
    front: list[tuple[float, float, tuple[Option, ...]]] = []
    for one in sorted(found, key=lambda one: one[:2]):
        if not front or one[1] < front[-1][1]:
            front.append(one)
    return front


def _depths(sites: Sequence[str]) -> dict[str, float]:
    """Return where in its transformer each site lies, as a share; two transformers of a pipeline count apart."""
    several = {site.partition(".")[0] for site in sites} == {"transformer", "transformer_2"}
    models: dict[str, list[str]] = {}
    for site in sites:
        models.setdefault(site.partition(".")[0] if several else "", []).append(site)
    return {site: i / len(group) for group in models.values() for i, site in enumerate(group)}


def _parts(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cut start..stop into parts as equal as whole numbers can be."""
    return list(pairwise(start + round((stop - start) * i / parts) for i in range(parts + 1)))


def _grains(cost: float) -> int:
    return round(cost * GRAIN)
