"""What was done, call by call: density, kernel, time, and every dense call with its reason."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .backend import kernel_name
from .call import AttentionCall, Site
from .config import Recipe
from .layout import TokenLayout
from .sparsity.plan import Plan
from .step import StepInfo

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


_Events = tuple[torch.cuda.Event, torch.cuda.Event]
Listener = Callable[[Site, StepInfo, str, "TokenLayout | None"], None]


@dataclass(frozen=True, eq=False)
class _Record:
    group: str
    step: int | None
    kind: str
    reason: str
    kernel: str
    pairs: float
    plan: Plan | None
    events: _Events | None

    @property
    def density(self) -> float:
        """Computed over possible pairs; on a GPU this waits for it."""
        return 1.0 if self.plan is None else float(self.plan.density())


@dataclass(frozen=True)
class Row:
    """One line of a report: calls of one layer group that were treated alike over a range of steps.

    `ms` is GPU time of their attention, None where it was not measured.
    """

    group: str
    steps: str
    kind: str
    calls: int
    density: float
    kernel: str
    reason: str
    ms: float | None = None


@dataclass(frozen=True)
class Report:
    """What an acceleration did in its last run.

    `density`: computed over possible pairs in the calls that ran sparse (1 if none did). `overall_density`: the
    same over all calls, dense ones counted as 1. `attention_share`: attention's share of the transformer's GPU
    time, None on other devices. `untouched`: sites that cannot be accelerated, with the reason.
    """

    recipe: str
    density: float
    overall_density: float
    sparse_calls: int
    calls: int
    steps: int
    layout: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    untouched: Mapping[str, str] = field(default_factory=dict)
    state_bytes: int = 0
    attention_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        for note in self.notes:
            yield f"note: {note}"
        for name, reason in self.untouched.items():
            yield f"untouched: {name} ({reason})"

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        share = "" if self.attention_share is None else f", attention {self.attention_share:.0%} of GPU time"
        table = Table(
            title=f"{self.recipe}: density {self.density:.3f} where sparse, {self.overall_density:.3f} overall",
            caption=f"{self.sparse_calls} of {self.calls} calls sparse, {self.steps} steps, {self.layout}{share}",
            box=box.SIMPLE,
        )
        timed = any(row.ms is not None for row in self.rows)
        for name in (
            "layers",
            "steps",
            "ran",
            "calls",
            "density",
            "kernel",
            *(["ms"] if timed else []),
            "why",
        ):
            number = name in ("calls", "density", "ms")
            table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=name != "why")
        for row in self.rows:
            ms = [] if not timed else ["" if row.ms is None else f"{row.ms:.1f}"]
            table.add_row(
                row.group,
                row.steps,
                row.kind,
                str(row.calls),
                f"{row.density:.3f}",
                row.kernel,
                *ms,
                row.reason,
            )
        return table

    def __str__(self) -> str:
        return self._render(io.StringIO()).rstrip()

    def _render(self, file: io.StringIO) -> str:
        from rich.console import Console

        Console(file=file, width=120, color_system=None).print(self)
        return file.getvalue()

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


class Ledger:
    """Write down every attention call of the last run; nothing is read from the device until a report is asked."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._run: int | None = None
        self._records: list[_Record] = []
        self._notes: dict[str, None] = {}
        self._layout: TokenLayout | None = None
        self._layouts: dict[str, None] = {}
        self._forwards: list[_Events] = []
        self._open: torch.cuda.Event | None = None
        self.listeners: tuple[Listener, ...] = ()  # told of each dense call: site, step, reason, layout

    def begin_forward(self, step: StepInfo, layout: TokenLayout | None, device: torch.device) -> None:
        """Start a transformer call; the first one of a new run forgets the run before."""
        if step.run != self._run:
            self._run = step.run
            self._records, self._notes, self._forwards, self._layouts = [], {}, [], {}
        self._layout = layout
        if layout is not None:
            self._layouts[str(layout)] = None
        self._open = _mark(device)

    def end_forward(self) -> None:
        """End a transformer call."""
        spent = _pair(self._open, torch.device("cuda"))
        if spent is not None:
            self._forwards.append(spent)
        self._open = None

    @contextmanager
    def timed(self, call: AttentionCall, plan: Plan) -> Iterator[None]:
        """Record a planned call around its run."""
        kernel, fallback = kernel_name(call.q.device, call.q.dtype, call.q.shape[-1], plan.precision)
        if plan.note:
            self._notes[plan.note] = None
        if fallback and not plan.dense and call.q.is_cuda:
            self._notes[f"the fast kernel was not used: {fallback}"] = None
        start = _mark(call.q.device)
        yield
        self._add(
            call.site,
            call.step,
            "dense" if plan.dense or plan.measures else "sparse",
            "the plan holds every pair" if plan.dense else plan.measures,
            "stock" if plan.dense else kernel,
            float(plan.queries * plan.keys),
            plan.counts(),
            _pair(start, call.q.device),
        )

    @contextmanager
    def timed_dense(self, site: Site, step: StepInfo, device: torch.device, reason: str) -> Iterator[None]:
        """Record a call that the stock attention runs, around its run."""
        start = _mark(device)
        yield
        self._add(site, step, "dense", reason, "stock", self._pairs(), None, _pair(start, device))

    def note_dense(self, site: Site, step: StepInfo, reason: str) -> None:
        """Record a call that ran out of the engine's sight."""
        self._add(site, step, "dense", reason, "stock", self._pairs(), None, None)

    def _pairs(self) -> float:
        return float(self._layout.length**2) if self._layout is not None else 1.0

    def _add(
        self,
        site: Site,
        step: StepInfo,
        kind: str,
        reason: str,
        kernel: str,
        pairs: float,
        plan: Plan | None,
        events: _Events | None,
    ) -> None:
        self._records.append(_Record(site.group, step.index, kind, reason, kernel, pairs, plan, events))
        if kind == "dense":
            for listen in self.listeners:
                listen(site, step, reason, self._layout)

    def report(self, untouched: Mapping[str, str], state_bytes: int, notes: Sequence[str] = ()) -> Report:
        """Add the records up; on a GPU this waits for it."""
        if self._forwards or any(r.events for r in self._records):
            torch.cuda.synchronize()
        density = [r.density for r in self._records]
        return Report(
            recipe=self._recipe.name,
            density=_mean([(d, r.pairs) for d, r in zip(density, self._records, strict=True) if r.kind == "sparse"]),
            overall_density=_mean([(d, r.pairs) for d, r in zip(density, self._records, strict=True)]),
            sparse_calls=sum(r.kind == "sparse" for r in self._records),
            calls=len(self._records),
            steps=len({r.step for r in self._records}),
            layout=", ".join(self._layouts) or "unknown",
            rows=tuple(_rows(self._records, density)),
            notes=(*self._notes, *notes),
            untouched=dict(untouched),
            state_bytes=state_bytes,
            attention_share=self._attention_share(),
        )

    def _attention_share(self) -> float | None:
        whole = sum(a.elapsed_time(b) for a, b in self._forwards)
        spent = sum(r.events[0].elapsed_time(r.events[1]) for r in self._records if r.events)
        return spent / whole if whole else None


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _pair(start: torch.cuda.Event | None, device: torch.device) -> _Events | None:
    end = _mark(device) if start is not None else None
    return (start, end) if start is not None and end is not None else None


def _mean(weighted: list[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(value * weight for value, weight in weighted) / total if total else 1.0


def _rows(records: list[_Record], density: list[float]) -> Iterator[Row]:
    """Group records by layer group and treatment, and each group's steps into unbroken ranges."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for i, r in enumerate(records):
        groups.setdefault((r.group, r.kind, r.kernel, r.reason), []).append(i)
    for (group, kind, kernel, reason), members in groups.items():
        events = [records[i].events for i in members]
        ms = sum(e[0].elapsed_time(e[1]) for e in events if e) if any(events) else None
        yield Row(
            group=group,
            steps=ranges(sorted({s for i in members if (s := records[i].step) is not None})),
            kind=kind,
            calls=len(members),
            density=_mean([(density[i], records[i].pairs) for i in members]),
            kernel=kernel,
            reason=reason,
            ms=ms,
        )


def ranges(steps: list[int]) -> str:
    """Write 0, 1, 2, 5 as '0-2, 5'."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "?"
