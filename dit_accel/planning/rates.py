"""How long work takes on a measured device: rates from the step benchmark's rows, and how far they are off.

A step is matrix products at one rate, all other operations at one bandwidth, and attention: dense at the rate measured
at that length, sparse by the computed pairs of slots, holes included, with the pooled keys that stand for the others,
and by the queries; and the decision by the pairs of units and the numbers it reads. Each rate comes from
`measured.json`, which `eval/bench_plan.py` writes from the step benchmark's results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

TABLE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Point:
    """An accelerated step at one density; `kernel_ms`, `decision_ms` and `reuse_ms` are of one attention alone."""

    density: float
    step_ms: float
    kernel_ms: float
    decision_ms: float
    reuse_ms: float


@dataclass(frozen=True)
class Case:
    """One measured model at one size: what its step does, and what it took.

    `matmul`, `traffic`: FLOPs and bytes beside the sites' attention (`work.Work`), `our_matmul`, `our_traffic` those of
    the accelerated step. `flops`: of one site's dense attention, of which there are `sites`; `tokens`, `heads`, `dim`:
    its sizes. `slots`, `units`: what its tokens take in our kernel, padding left out, and whether they are `whole`,
    without holes; `pooled`: the mean keys of a correction that each query may attend to. `attention_ms` of all sites in
    the stock step of `stock_ms`; `sdpa_ms` of one without a mask.
    """

    case: str
    matmul: float
    traffic: float
    our_matmul: float
    our_traffic: float
    flops: float
    sites: int
    tokens: int
    heads: int
    dim: int
    masked: bool
    slots: int
    units: int
    whole: bool
    stock_ms: float
    attention_ms: float
    sdpa_ms: float
    points: tuple[Point, ...]
    pooled: int = 0

    def sparse(self, density: float) -> Sparse:
        """Return what one of its attentions does at a density."""
        return Sparse(density, self.slots, self.units, self.whole, self.heads, self.dim, self.pooled)


@dataclass(frozen=True)
class Device:
    """The measured cases of one GPU, the recipe they ran with (`settings` it had other than today), and the source."""

    name: str
    gpu: str
    recipe: str
    settings: Mapping[str, Any]
    source: Mapping[str, str]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Judged:
    """A measured step beside the model's, which had not seen any row of that case. `density` None: the stock step."""

    case: str
    density: float | None
    measured_ms: float
    modelled_ms: float

    @property
    def error(self) -> float:
        """The model's share too much, or too little."""
        return self.modelled_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Sparse:
    """One sparse attention of a sample: what our kernel and its decision have to do."""

    density: float
    slots: int
    units: int
    whole: bool
    heads: int
    dim: int
    pooled: int = 0

    @property
    def kernel(self) -> tuple[float, float]:
        """FLOPs of the computed pairs of slots and of slots and pooled keys, and the queries that start a row."""
        queries = self.heads * self.slots
        return 4.0 * queries * (self.density * self.slots + self.pooled) * self.dim, float(queries)

    @property
    def decision(self) -> tuple[float, float]:
        """Pairs of units, and the numbers of queries and keys that are read."""
        return float(self.heads * self.units**2), float(self.heads * self.slots * self.dim)


@dataclass(frozen=True)
class Rates:
    """Costs in ms, each of some kinds of work, and dense attention's FLOPs a ms, from some measured cases.

    `rest`: of a FLOP and of a byte; `kernel`, `decision`, `reuse`: as `Sparse` counts, `kernel` with and without holes
    in its blocks, which take another path. `dense`, `masked`: (tokens, rate) of dense attention, the latter where stock
    is given a mask. What no case shows (masks, or blocks of one sort) has the rate of the other sort.
    """

    rest: tuple[float, ...]
    dense: tuple[tuple[int, float], ...]
    masked: tuple[tuple[int, float], ...]
    kernel: Mapping[bool, tuple[float, ...]]
    decision: tuple[float, ...]
    reuse: tuple[float, ...]

    @classmethod
    def fit(cls, cases: Sequence[Case]) -> Rates:
        """Read the rates off measured cases, at least two."""
        rows = [(case.sparse(p.density), p) for case in cases for p in case.points]
        # timed alone, a short decision takes as long as its launches; in a step the GPU is at work meanwhile
        decisions = [(*sparse.decision, 1.0) for sparse, _ in rows]
        return cls(
            rest=costs([(c.matmul, c.traffic) for c in cases], [c.stock_ms - c.attention_ms for c in cases]),
            dense=tuple((c.tokens, c.flops / (c.sdpa_ms if c.masked else c.attention_ms / c.sites)) for c in cases),
            masked=tuple((c.tokens, c.flops * c.sites / c.attention_ms) for c in cases if c.masked),
            kernel={whole: _kernel(rows, whole) for whole in (False, True)},
            decision=costs(decisions, [p.decision_ms for _, p in rows])[:2],
            reuse=costs(decisions, [p.reuse_ms for _, p in rows])[:2],
        )

    def rest_ms(self, matmul: float, traffic: float) -> float:
        """Return the time of all that is not the sites' attention."""
        return _spent((matmul, traffic), self.rest)

    def dense_ms(self, flops: float, tokens: int, masked: bool) -> float:
        """Return the time of one dense attention, at the rate measured at the nearest lengths."""
        points = sorted((self.masked if masked else ()) or self.dense)
        lengths, rates = np.array(points).T
        return flops / float(np.interp(np.log(tokens), np.log(lengths), rates))

    def kernel_ms(self, call: Sparse) -> float:
        """Return the time of our kernel on one attention."""
        return _spent(call.kernel, self.kernel[call.whole])

    def decision_ms(self, call: Sparse, every: int = 1) -> float:
        """Return the mean time of a call's decision, made once in `every` calls and kept for the others."""
        made, kept = _spent(call.decision, self.decision), _spent(call.decision, self.reuse)
        return (made + (every - 1) * kept) / every


@lru_cache(maxsize=1)
def devices() -> dict[str, Device]:
    """Return the measured devices by name; none where there is no table."""
    if not TABLE.is_file():
        return {}
    return {name: device(name, data) for name, data in json.loads(TABLE.read_text(encoding="utf-8")).items()}


def device(name: str, data: Mapping[str, Any]) -> Device:
    """Read one device of the table."""
    cases = tuple(Case(**{**case, "points": tuple(Point(**p) for p in case["points"])}) for case in data["cases"])
    return Device(name, data["gpu"], data["recipe"], data["settings"], data["source"], cases)


def leave_one_out(cases: Sequence[Case]) -> list[Judged]:
    """Model each case's steps from all the others' rows alone, stock first."""
    found = []
    for case in cases:
        rates = Rates.fit([other for other in cases if other is not case])
        rest = rates.rest_ms(case.matmul, case.traffic)
        dense = rates.dense_ms(case.flops, case.tokens, case.masked)
        found.append(Judged(case.case, None, case.stock_ms, rest + case.sites * dense))
        rest = rates.rest_ms(case.our_matmul, case.our_traffic)
        for point in case.points:
            call = case.sparse(point.density)
            spent = rates.kernel_ms(call) + rates.decision_ms(call)
            found.append(Judged(case.case, point.density, point.step_ms, rest + case.sites * spent))
    return found


def mean_error(judged: Iterable[Judged]) -> float:
    """Return the mean absolute error as a share."""
    return float(np.mean([abs(one.error) for one in judged]))


def costs(work: Sequence[tuple[float, ...]], ms: Sequence[float]) -> tuple[float, ...]:
    """Solve ms = work · costs for costs of at least 0, every row counting by its relative error."""
    rows = np.array(work) / np.array(ms)[:, None]
    size, kinds = rows.max(0), range(rows.shape[1])
    best = (np.inf, np.zeros(len(kinds)))
    for used in (list(some) for n in kinds for some in combinations(kinds, n + 1)):
        found = np.zeros(len(kinds))
        found[used] = np.linalg.lstsq(rows[:, used] / size[used], np.ones(len(rows)))[0] / size[used]
        missed = float(np.square(rows @ found - 1).sum())
        if (found >= 0).all() and missed < best[0]:
            best = (missed, found)
    return tuple(float(cost) for cost in best[1])


def _kernel(rows: Sequence[tuple[Sparse, Point]], whole: bool) -> tuple[float, ...]:
    alike = [(sparse, point) for sparse, point in rows if sparse.whole is whole] or rows
    return costs([sparse.kernel for sparse, _ in alike], [point.kernel_ms for _, point in alike])


def _spent(work: Sequence[float], cost: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(work, cost, strict=True))
