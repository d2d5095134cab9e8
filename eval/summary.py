"""From rows to one line a candidate: means over prompts with bootstrap intervals, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dit_accel.sparsity.planner import first_sparse

from .modelled import Model
from .store import Family, Row, Setup

FIGURES = ("psnr", "ssim", "ms_ssim", "flip", "temporal_error", "vmaf")
LOWER_IS_BETTER = ("flip", "temporal_error")
DRAWS, LEVEL = 2000, 0.95
ENOUGH = 6  # prompts; with fewer, differences all of one sign happen by chance in more than 5 % (sign test)


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its 95 % bootstrap interval, None where there is one prompt only.

    The interval of fewer prompts than ENOUGH is too narrow to decide anything by.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    prompts: int = 1


@dataclass(frozen=True)
class Standing:
    """What one candidate came to; `modelled` is seconds by the name of a measured model.

    The oracle has no time: it computes the attention it is to save.
    `psnr` is over the pictures that differ from the reference at all, absent where none does (`equal` is then true).
    `spent`: computed over possible pairs in all calls that may run sparse, also those that ran in full all the same.
    """

    candidate: str
    family: Family
    asked: float | None
    prompts: int
    figures: Mapping[str, Interval] = field(default_factory=dict)
    equal: bool = False
    seconds: Interval | None = None
    density: float | None = None
    overall_density: float | None = None
    spent: float | None = None
    steps: int | None = None
    peak_bytes: int | None = None
    recall: float | None = None
    best_recall: float | None = None
    error: float | None = None
    modelled: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def standings(rows: Sequence[Row], models: Sequence[Model] = (), setup: Setup | None = None) -> list[Standing]:
    """Return one line a candidate: the reference, then families in the order they came, best PSNR first in each."""
    lines = [_standing(group, models, setup) for group in by_candidate(rows).values()]
    families = list(dict.fromkeys(line.family for line in lines))
    return sorted(lines, key=lambda line: (families.index(line.family), -rank(line)))


def by_candidate(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each candidate, in the order they came."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.candidate, []).append(row)
    return groups


def spent(row: Row, setup: Setup) -> float | None:
    """Return computed over possible pairs in all calls of a row that may run sparse; None where no map was made."""
    if row.map is None:
        return None
    first = first_sparse(len(row.map.density), setup.dense_steps)
    return _mean([density for step in row.map.density[first:] for density in step[setup.dense_layers :]])


def paired(ours: Sequence[Row], theirs: Sequence[Row], figure: str = "psnr") -> Interval | None:
    """Return by how much one candidate's figure is above another's: the mean over the prompts that both have.

    Pictures of one prompt and seed are compared with each other, so what makes a prompt hard cancels out. None where
    they share no prompt with a finite figure.
    """
    other = {(row.prompt, row.seed): row for row in theirs}
    apart: dict[str, list[float]] = {}
    for row in ours:
        a, b = (getattr(one.figures, figure, None) if one else None for one in (row, other.get((row.prompt, row.seed))))
        if a is not None and b is not None:
            apart.setdefault(row.prompt, []).append(a - b)
    return bootstrap([float(np.mean(values)) for values in apart.values()]) if apart else None


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the mean of one value a prompt and its percentile bootstrap interval (Efron 1979; a fixed seed)."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return Interval(float(data.mean()))
    picks = np.random.default_rng(0).integers(len(data), size=(DRAWS, len(data)))
    low, high = np.quantile(data[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, worth) points no other beats in one without losing in the other, cheapest first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _standing(rows: Sequence[Row], models: Sequence[Model], setup: Setup | None) -> Standing:
    good = [row for row in rows if row.error is None]
    figures = {
        name: interval
        for name in FIGURES
        if (interval := _over_prompts(good, lambda row, name=name: getattr(row.figures, name, None))) is not None
    }
    samples = [sample for row in good for sample in row.samples]
    best = [sample.best_recall for sample in samples if sample.best_recall is not None]
    return Standing(
        candidate=rows[0].candidate,
        family=rows[0].family,
        asked=rows[0].asked,
        prompts=len({row.prompt for row in good}),
        figures=figures,
        equal=bool(good) and all(row.figures is not None and row.figures.psnr is None for row in good),
        seconds=_over_prompts(good, lambda row: row.seconds if row.family != "oracle" else None),
        density=_mean([row.density for row in good]),
        overall_density=_mean([row.overall_density for row in good]),
        spent=None if setup is None else _mean([spent(row, setup) for row in good]),
        steps=next((row.steps for row in good), None),
        peak_bytes=max((row.peak_bytes for row in good if row.peak_bytes is not None), default=None),
        recall=_mean([sample.recall for sample in samples]),
        best_recall=_mean(best),
        error=_mean([sample.error for sample in samples]),
        modelled=_modelled(good, models),
        failures=tuple(dict.fromkeys(row.error for row in rows if row.error is not None)),
    )


def _over_prompts(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Interval | None:
    """Average the seeds of each prompt first: prompts are what the interval is over."""
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        found = value(row)
        if found is not None:
            by_prompt.setdefault(row.prompt, []).append(found)
    return bootstrap([float(np.mean(values)) for values in by_prompt.values()]) if by_prompt else None


def _modelled(rows: Sequence[Row], models: Sequence[Model]) -> dict[str, float]:
    found = {model.name: _mean([model.seconds(row) for row in rows]) for model in models}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def rank(line: Standing) -> float:
    """Return what candidates are sorted by: PSNR, infinite where every picture equals the reference."""
    return line.figures["psnr"].mean if "psnr" in line.figures else float("inf") if line.equal else float("-inf")
