"""What may be chosen in each part of model and run, from a study's rows, and the best choices within a budget.

The parts are cells of a grid, depth by step. In each cell every recipe at every density that was run is an option, with
what it computed there (from the rows' density maps) and how much it erred there (from the calls that were looked at);
computing everything is one too. The best choice for a budget is a knapsack with one option from each cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dit_accel.config import Recipe, build
from dit_accel.errors import ConfigError
from dit_accel.sparsity.planner import first_sparse

from .store import Row, Setup

GRAIN = 20_000  # parts of the whole that costs are counted in
FULL = "dense"
Span = tuple[float, float]


@dataclass(frozen=True)
class Option:
    """What may be chosen in a cell; `recipe` None is everything. `cost` and `loss` are means over the cell's calls.

    `cost`: computed over possible pairs. `loss`: squared relative error of the output.
    """

    name: str
    recipe: Recipe | None
    cost: float
    loss: float


@dataclass(frozen=True)
class Cell:
    """One part of model and run: shares of the sites and of the steps, its share of all calls, what may be chosen."""

    depth: Span
    steps: Span
    share: float
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Mixed:
    """One option for each cell, and what they come to together."""

    cells: tuple[Cell, ...]
    picks: tuple[Option, ...]

    @property
    def cost(self) -> float:
        """Computed over possible pairs, of all calls that may run sparse."""
        return sum(cell.share * pick.cost for cell, pick in zip(self.cells, self.picks, strict=True))

    @property
    def loss(self) -> float:
        """Mean squared relative error over the same calls."""
        return sum(cell.share * pick.loss for cell, pick in zip(self.cells, self.picks, strict=True))


def cells_of(candidates: Mapping[str, Sequence[Row]], setup: Setup, groups: int, windows: int) -> list[Cell]:
    """Cut model and run into cells, and say of each candidate what it computed and how it erred there.

    `candidates`: rows of recipes, by name, each with density maps and samples.
    """
    first = next(row.map for group in candidates.values() for row in group if row.map is not None)
    sites, steps = _depths(first.sites), len(first.density)
    start = first_sparse(steps, setup.dense_steps)
    out = []
    for depth in _parts(0, groups, groups):
        here = [site for site, at in sites.items() if depth[0] / groups <= at < depth[1] / groups]
        for window in _parts(start, steps, windows):
            when = range(*window)
            if not here or not when:
                continue
            options = [Option(FULL, None, 1.0, 0.0)]
            options += [o for name, rows in candidates.items() if (o := _option(name, rows, here, when)) is not None]
            share = len(here) * len(when) / (len(sites) * (steps - start))
            since = 0.0 if window[0] == start else window[0] / steps
            span = (depth[0] / groups, depth[1] / groups)
            out.append(Cell(span, (since, window[1] / steps), share, tuple(options)))
    return out


def cheapest(cells: Sequence[Cell]) -> float:
    """Return the least that any picks compute, over possible pairs, each cell's cost rounded up as `knapsack` does."""
    return sum(min(_grains(cell, option) for option in cell.options) for cell in cells) / GRAIN


def knapsack(cells: Sequence[Cell], budget: float) -> Mixed:
    """Return the picks of least loss whose cost stays in the budget, exact but for costs rounded up to a grain.

    Raises ConfigError where not even the cheapest do.
    """
    room = int(budget * GRAIN + 1e-6)
    least = np.zeros(room + 1)
    taken = np.zeros((len(cells), room + 1), dtype=np.int64)
    for at, cell in enumerate(cells):
        losses = np.full((len(cell.options), room + 1), np.inf)
        for i, option in enumerate(cell.options):
            cost = _grains(cell, option)
            if cost <= room:
                losses[i, cost:] = least[: room + 1 - cost] + cell.share * option.loss
        taken[at], least = losses.argmin(0), losses.min(0)
    if not np.isfinite(least[room]):
        raise ConfigError(f"density {budget:g}: the cheapest choices measured take {cheapest(cells):.3f}.")
    picks: list[Option] = []
    for at in range(len(cells) - 1, -1, -1):
        picks.append(cells[at].options[taken[at, room]])
        room -= _grains(cells[at], picks[-1])
    return Mixed(tuple(cells), tuple(picks[::-1]))


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
    loss = sparse * float(np.mean(errors)) if errors else 0.0
    return Option(name, build(Recipe, rows[0].definition, name), float(density.mean()), loss)


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


def _grains(cell: Cell, option: Option) -> int:
    return int(np.ceil(cell.share * option.cost * GRAIN - 1e-6))
