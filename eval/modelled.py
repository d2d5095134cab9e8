"""The third time axis: steps and densities run here, times what a step of a true-sized model was measured to take.

It needs `benchmarks/results/step_*.json` of `eval/bench_step.py`; without such a file there is no such axis. What a
recipe's own decisions and blocks cost beside the benchmark's recipe is taken from `decide_*.json` of
`eval/bench_decide.py`, where that has both at the same shape; elsewhere all are charged the same, and the report
says so (`Model.caveat`). A step of a recipe that keeps decisions is the mean over the steps that one lasts; results in
which the kept ones were not timed are no such axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.sparsity.recipes import resolve

from .store import Row

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
NUMBERS = ("density", "step_ms", "stock_step_ms")  # that every row must hold
SHAPES = ("wan-14b-720p-81", "flux-4096")  # a long clip and a large picture; of results that have neither, all


@dataclass(frozen=True)
class Call:
    """What a recipe's attention call costs at a true shape: its decision, and its kernels for each unit of density.

    `density`: at which those were timed; `hopper`: whether with the kernel for Hopper.
    """

    decision_ms: float
    kernel_ms: float
    density: float
    hopper: bool

    def more_than(self, other: Call, density: float) -> float:
        """Return how many ms more a call takes.

        Kernels count only where both were timed with the same one, and up to twice the density at which they were:
        where few pairs are computed most of them lie in part of a block, which says nothing of whole ones.
        """
        known = self.hopper == other.hopper and density <= 2 * self.density
        kernels = density * (self.kernel_ms - other.kernel_ms) if known else 0.0
        return self.decision_ms - other.decision_ms + kernels


@dataclass(frozen=True)
class Model:
    """One measured model: ms of a stock step, and of an accelerated one at each measured density, ascending.

    `recipe` is whose steps they are. `calls` by recipe, where measured at this shape; a step has `depth` of them.
    """

    name: str
    device: str
    stock_ms: float
    densities: tuple[float, ...]
    step_ms: tuple[float, ...]
    recipe: str = ""
    depth: int = 0
    calls: Mapping[str, Call] = field(default_factory=dict)

    @property
    def caveat(self) -> str | None:
        """Say that decisions were not measured at this shape, None where they were."""
        if self.recipe in self.calls:
            return None
        return (
            f"modelled s ({self.name}, {self.device}) charges every recipe the decisions and kernels of "
            f"{self.recipe or 'the step benchmark'}: no recipe's own were timed at this shape (eval/bench_decide.py); "
            "others with a correction have none"
        )

    def seconds(self, row: Row) -> float | None:
        """Return the modelled seconds of all steps of a row; None where what was left out is not known (caches).

        Each call counts as its share of a step at its density: between measured densities on a straight line, below
        the least one as that one, above the largest on the line of the last two. Dense calls take stock's time.
        Decisions and kernels of a recipe that was measured at this shape cost what they cost there, on the average of
        a run, those of others what the benchmark's recipe costs; others with a correction not measured have none.
        """
        if row.steps is None or row.family in ("cache", "floor", "oracle") or row.error or self._untimed(row):
            return None
        if row.map is None:
            return row.steps * self.stock_ms / 1e3
        name = str(row.definition.get("name"))
        return sum(float(np.mean([self._step(d, name) for d in step])) for step in row.map.density) / 1e3

    def _untimed(self, row: Row) -> bool:
        return bool(row.definition.get("correct")) and row.definition.get("name") not in {*self.calls, self.recipe}

    def _step(self, density: float, recipe: str) -> float:
        if density >= 1:
            return self.stock_ms
        if recipe in self.calls and self.recipe in self.calls:
            more = self.calls[recipe].more_than(self.calls[self.recipe], density)
            return self._measured(density) + self.depth * more
        return self._measured(density)

    def _measured(self, density: float) -> float:
        if density <= self.densities[-1] or len(self.densities) == 1:
            return float(np.interp(density, self.densities, self.step_ms))
        (d0, d1), (t0, t1) = self.densities[-2:], self.step_ms[-2:]
        return t1 + (density - d1) * (t1 - t0) / (d1 - d0)


def models(folder: Path = RESULTS) -> list[Model]:
    """Read all measured models of a folder; none where there are no files. Raises ConfigError on a broken one.

    A shape whose decisions were timed on one device is not modelled on others, where they were not.
    """
    found = [
        _model(case, data, folder)
        for _, data in step_results(folder)
        if all(_mean_step(row, data) is not None for row in data["rows"])
        for case in _shapes(data)
    ]
    timed = {model.name for model in found if model.caveat is None}
    return [model for model in found if model.caveat is None or model.name not in timed]


def _mean_step(row: Mapping[str, Any], data: Mapping[str, Any]) -> float | None:
    """Return the mean ms of the steps that a decision lasts; None where those that keep it were not timed."""
    recipe = data.get("recipe")
    every = row.get("every") or (resolve({"base": recipe, **data.get("settings", {})}).every if recipe else 1)
    if every == 1:
        return float(row["step_ms"])
    kept = row.get("kept_step_ms")
    return None if kept is None else (float(row["step_ms"]) + (every - 1) * float(kept)) / every


def _shapes(data: Mapping[str, Any]) -> list[str]:
    cases = list(dict.fromkeys(row["case"] for row in data["rows"]))
    return [case for case in SHAPES if case in cases] or cases


def step_results(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """Read the step benchmark's results of a folder, those of tiny twins aside. Raises ConfigError on a broken one."""
    files = [file for file in sorted(folder.glob("step_*.json")) if not file.name.startswith("step_tiny_")]
    return [(file, _read(file)) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        str(data["gpu"]), [(str(row["case"]), *(float(row[key]) for key in NUMBERS)) for row in data["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: is no result of the step benchmark ({type(error).__name__}: {error}).") from None
    return data


def _model(case: str, data: Mapping[str, Any], folder: Path) -> Model:
    rows = [row for row in data["rows"] if row["case"] == case]
    found = {float(row["density"]): ms for row in rows if (ms := _mean_step(row, data)) is not None}
    points = sorted(found.items())
    device = data["gpu"]
    return Model(
        name=case,
        device=device,
        recipe=data.get("recipe", ""),
        stock_ms=float(rows[0]["stock_step_ms"]),
        densities=tuple(density for density, _ in points),
        step_ms=tuple(ms for _, ms in points),
        depth=int(rows[0].get("depth", 0)),
        calls=_calls(folder / f"decide_{case}_{'-'.join(device.lower().split())}.json"),
    )


def _calls(file: Path) -> dict[str, Call]:
    """Read what each recipe's calls cost; nothing where there is no such file. Raises ConfigError on a broken one."""
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return {row["recipe"]: _call(row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: is no result of bench_decide ({type(error).__name__}: {error}).") from None


def _call(row: dict[str, Any]) -> Call:
    """Make a mean call of a run: its decision, and its attention and merge."""
    kinds = row["kinds"].values()
    spent = sum(kind["calls"] * (kind["device"]["kernel"] + kind["device"]["merge"]) for kind in kinds)
    ms = spent / sum(kind["calls"] for kind in kinds)
    return Call(row["decision_ms"], ms / row["density"], row["density"], bool(row.get("hopper")))
