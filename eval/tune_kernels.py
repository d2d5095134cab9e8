"""Measure which tiles of the block-sparse kernels are fastest on this GPU: the work of `dit-accel tune-kernels`.

A tile is timed only after its result on the very call was held against float64 on sampled rows, with poisoned memory
and twice for the same bits. One that does not compile, does not fit or is wrong is left out and named. It stands for
its kind of call only when it is right on the kind's other calls, too, and faster again when old and new take turns.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table as Screen

from dit_accel import __version__
from dit_accel.eval.source import provenance
from dit_accel.eval.tune_cases import (
    FLAVOURS,
    WORST_ERROR,
    Case,
    Gold,
    attend,
    candidates,
    distance,
    error,
    gold,
    make_problem,
)
from dit_accel.kernels.block_sparse import tuned
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.tiles import Tile

GAIN = 0.98  # of the present time, which a new tile must stay below
LOUDER = 2.0  # times the present tile's error, which a new one's may not pass
Clock = Callable[[Callable[[], Any]], float]
Said = Callable[[str], None]


@dataclass
class Outcome:
    """What came of one case; times in ms. `before_ms` is None where the present tile gives wrong results here."""

    case: Case
    before: Tile
    before_ms: float | None
    tile: Tile
    ms: float
    error: float
    tried: int = 0
    dropped: list[str] = field(default_factory=list)
    whole: bool = True  # whether there was time for all candidates

    @property
    def better(self) -> bool:
        return self.tile != self.before

    def entry(self) -> tuned.Entry:
        """Return what the table keeps of it."""
        case, shape = self.case, tuned.Shape(**asdict(self.tile))
        key: Any = {name: getattr(case, name) for name in ("precision", "kind", "dim", "block_q", "block_k")}
        return tuned.Entry(**key, tile=shape, ms=self.ms, before_ms=self.before_ms, error=self.error)


class DeadDeviceError(RuntimeError):
    """The device answers no more; nothing after this can be measured."""


class Calls:
    """The calls of one case, and the references they are held to, made when they are needed."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self._made: dict[int, tuple[Problem, Gold]] = {}

    def made(self, number: int) -> tuple[Problem, Gold]:
        if number not in self._made:
            problem = make_problem(self.case, FLAVOURS[self.case.kind][number], self.device, self.dtype)
            self._made[number] = (problem, gold(problem))
        return self._made[number]

    def error(self, tile: Tile, number: int = 0) -> float:
        """Return a tile's error on one of the calls; NaN where it is wrong. Raises what the compiler raises."""
        return error(*self.made(number), tile)

    def run(self, tile: Tile) -> Callable[[], Any]:
        return partial(attend, self.made(0)[0], tile)


def tune(case: Case, calls: Calls, clock: Clock, until: float, said: Said, now: Callable[[], float]) -> Outcome:
    """Try tiles on one case until a time; return the best, which is the present one unless another proved faster.

    Those that differ least from the best so far come first.
    """
    before = present(case, calls)
    least = present_error(before, calls)
    before_ms = clock(calls.run(before)) if least < WORST_ERROR else None
    worst = min(WORST_ERROR, LOUDER * least) if before_ms is not None else WORST_ERROR
    found = Outcome(case, before, before_ms, before, before_ms or float("inf"), least)
    left = candidates(case, before, capability(calls.device))
    while left:
        if now() >= until:
            found.whole = False
            break
        tile = min(left, key=lambda other: distance(other, found.tile))
        left.remove(tile)
        said(f"{case.name} {shown(tile)}")
        found.tried += 1
        try:
            _try(tile, calls, clock, worst, found)
        except Exception as failure:  # whatever the compiler or the driver says of one tile must not end the search
            found.dropped.append(f"{shown(tile)}: {next(iter(str(failure).splitlines()), type(failure).__name__)}")
            _check_alive(calls.device, found)
    return _confirmed(found, calls, clock)


def present_error(tile: Tile, calls: Calls) -> float:
    """Return the present tile's error; NaN also where it does not run on this GPU, which any other may then replace."""
    calls.made(0)
    try:
        return calls.error(tile)
    except Exception:  # whatever the compiler says of it
        return float("nan")


def _try(tile: Tile, calls: Calls, clock: Clock, worst: float, found: Outcome) -> None:
    """Check a tile, time it, and keep it where it is the fastest so far and right on all calls of its kind."""
    seen = calls.error(tile)
    if not seen <= worst:
        found.dropped.append(f"{shown(tile)}: wrong, error {seen:.1e}")
        return
    ms = clock(calls.run(tile))
    if ms >= found.ms:
        return
    for number in range(1, len(FLAVOURS[calls.case.kind])):
        other = calls.error(tile, number)
        if not other < WORST_ERROR:
            flavour = FLAVOURS[calls.case.kind][number]
            found.dropped.append(f"{shown(tile)}: wrong on a call that is {flavour}, error {other:.1e}")
            return
    found.tile, found.ms, found.error = tile, ms, seen


def _confirmed(found: Outcome, calls: Calls, clock: Clock) -> Outcome:
    """Time old and new in turn, and go back to the old one where the new one's gain was luck."""
    if not found.better or found.before_ms is None:
        return found
    turns = [[clock(calls.run(tile)) for tile in (found.before, found.tile)] for _ in range(3)]
    found.before_ms, found.ms = (statistics.median(times) for times in zip(*turns, strict=True))
    if found.ms >= GAIN * found.before_ms:
        found.tile, found.ms, found.error = found.before, found.before_ms, calls.error(found.before)
    return found


def _check_alive(device: torch.device, found: Outcome) -> None:
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeadDeviceError(f"the device answers no more after {found.dropped[-1]}") from error


def tune_all(
    cases: Sequence[Case],
    device: torch.device,
    seconds: float,
    clock: Clock,
    said: Said,
    dtype: torch.dtype = torch.bfloat16,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Tune all cases, each with an equal share of the time that is left; those without any are not begun."""
    end = now() + seconds
    for at, case in enumerate(cases):
        start = now()
        if start >= end:
            return
        until = start + (end - start) / (len(cases) - at)
        yield tune(case, Calls(case, device, dtype), clock, until, said, now)


def present(case: Case, calls: Calls) -> Tile:
    """Return the tile that a call of this case takes now."""
    from dit_accel.kernels.block_sparse import quantised_triton, triton

    kernel = quantised_triton if case.precision == "int8" else triton
    return kernel._tile_for(calls.made(0)[0])


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def gpu_clock(run: Callable[[], Any]) -> float:
    """Return the median of a call's times on the GPU, ms."""
    from triton.testing import do_bench

    return statistics.median(do_bench(run, warmup=25, rep=100, return_mode="all"))


def table_of(outcomes: Sequence[Outcome], old: tuned.Table | None, device: torch.device) -> tuned.Table:
    """Put what was found into the table in force, if one is: a new entry in the place of an old one for its calls."""
    gpu, source = tuned.gpu_name(device), provenance(device)
    kept = {} if old is None or old.misfit(gpu) else {entry.key: entry for entry in old.tiles}
    kept |= {entry.key: entry for entry in (one.entry() for one in outcomes if one.better)}
    return tuned.Table(
        format=1,
        gpu=gpu,
        capability=capability(device),
        torch=source["torch"],
        triton=tuned.triton_version(),
        dit_accel=__version__,
        commit=source["commit"],
        date=datetime.date.today().isoformat(),
        kernels=tuned.source_hash(),
        tiles=tuple(kept.values()),
    )


def shown(tile: Tile) -> str:
    """Name a tile in few words."""
    words = (f"{tile.q}x{tile.k} w{tile.warps} s{tile.stages}", "tma" * tile.tma, "packed" * tile.pack)
    return " ".join(word for word in words if word)


def screen_table(outcomes: Sequence[Outcome], gpu: str) -> Screen:
    """Lay out old and new tiles, ms of one call each, and how many tiles were tried and left out."""
    screen = Screen(title=f"tiles on {gpu}", caption="ms of one call; left out: did not compile, did not fit, or wrong")
    for name in ("call", "present tile", "ms", "new tile", "ms", "gain", "error", "tried", "left out"):
        screen.add_column(name, justify="left" if "tile" in name or name == "call" else "right", no_wrap=True)
    for one in outcomes:
        was = "wrong" if one.before_ms is None else f"{one.before_ms:.3f}"
        new = (shown(one.tile), f"{one.ms:.3f}") if one.better else ("kept", "")
        gain = f"{one.before_ms / one.ms:.2f}x" if one.better and one.before_ms else ""
        tried = f"{one.tried}{'' if one.whole else '+'}"
        screen.add_row(
            one.case.name, shown(one.before), was, *new, gain, f"{one.error:.1e}", tried, str(len(one.dropped))
        )
    return screen
