"""What a plan says, as typed data and as tables for people."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """Calls of one layer group that will be treated alike.

    `steps`: which, from 0; `share` of all steps; `sites`: attention modules at each of these steps. `tokens`, `heads`,
    `dim`: the sizes of a call (None where it never reaches the engine). `kind`: "dense" or "sparse"; `reason`: why it
    is dense. `asked`: density asked for, `density`: expected, both None where the attention decides.
    """

    group: str
    steps: str
    share: float
    sites: int
    kind: str
    reason: str
    layout: str
    tokens: int | None
    heads: int | None
    dim: int | None
    asked: float | None
    density: float | None


@dataclass(frozen=True)
class Times:
    """Modelled times, one sample through the transformer once a step (guidance by a second call takes as long again).

    `stock_ms`: a stock step; `sparse_ms`: mean of the steps with sparse calls; `mean_ms`: of all steps; the latter two
    are None where `untimed` says what was not measured. `stock_error`, `accelerated_error`: mean absolute error of the
    model as a share, each measured case modelled from the others alone. `measured_on`: GPU, versions, commit, date.
    """

    stock_ms: float
    sparse_ms: float | None
    mean_ms: float | None
    untimed: str
    stock_error: float
    accelerated_error: float
    measured_on: Mapping[str, str]

    @property
    def speedup(self) -> float | None:
        """Stock over accelerated time of the whole run."""
        return None if self.mean_ms is None else self.stock_ms / self.mean_ms


@dataclass(frozen=True)
class Memory:
    """Bytes: of the transformers' weights, of the most activations at a time, and of what is kept between steps.

    `activations` as eager mode holds them for one sample; `state`: the recipe's declared bytes, `text`: the prompt's
    keys and values kept for cross-attention, both for each guidance branch. What a decision or a library needs for a
    moment is not in it.
    """

    weights: int
    activations: int
    state: int
    text: int

    @property
    def total(self) -> int:
        """All of it, with one guidance branch."""
        return self.weights + self.activations + self.state + self.text


@dataclass(frozen=True)
class Size:
    """A size nearby whose sparse attention wastes less: `padding`: slots a token that the kernel computes.

    `mean_ms` as in `Times`, None where nothing was measured.
    """

    height: int
    width: int
    frames: int | None
    tokens: int
    padding: float
    mean_ms: float | None
    why: str


@dataclass(frozen=True)
class RunPlan:
    """What an accelerated run will do, layer group by layer group, and what it will take.

    `matmul_flops`, `attention_flops`: of a stock step; `density`: overall, of all calls of the run, None where the
    attention decides. `times` is None where `untimed` says why. `faster`: sizes nearby, nearest first.
    """

    model: str
    device: str
    recipe: str
    height: int
    width: int
    frames: int | None
    steps: int
    layout: str
    rows: tuple[Row, ...]
    density: float | None
    matmul_flops: float
    attention_flops: float
    memory: Memory
    times: Times | None
    untimed: str
    faster: tuple[Size, ...] = ()
    notes: tuple[str, ...] = ()
    untouched: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        data = asdict(self)
        if self.times is not None:
            data["times"]["speedup"] = self.times.speedup
        data["memory"]["total"] = self.memory.total
        return data

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        yield from self._lines()

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        size = f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames else "")
        table = Table(title=f"{self.model}, {size}: {self.recipe}, {self.steps} steps", box=box.SIMPLE)
        numbers = ("sites", "tokens", "heads", "asked", "density")
        for name in ("layers", "steps", "sites", "tokens", "heads", "will run", "asked", "density", "why"):
            align = "right" if name in numbers else "left"
            table.add_column(name, justify=align, overflow="fold", no_wrap=name != "why")
        for row in self.rows:
            heads = "" if row.heads is None else f"{row.heads} x {row.dim}"
            figures = ("" if x is None else f"{x:.3f}" for x in (row.asked, row.density))
            tokens = "" if row.tokens is None else f"{row.tokens}"
            table.add_row(row.group, row.steps, str(row.sites), tokens, heads, row.kind, *figures, row.reason)
        return table

    def _lines(self) -> Iterator[str]:
        overall = "follows from the attention" if self.density is None else f"{self.density:.3f}"
        yield f"layout: {self.layout}; overall density: {overall}"
        beside, inside = self.matmul_flops / 1e12, self.attention_flops / 1e12
        yield f"stock step: {beside:.4g} TFLOP beside attention, {inside:.4g} in it"
        yield from self._time_lines()
        m = self.memory
        yield (
            f"memory: {_size(m.weights)} weights, {_size(m.activations)} activations, "
            f"{_size(m.state + m.text)} kept between steps a guidance branch"
        )
        for size in self.faster:
            frames = "" if size.frames is None else f", {size.frames} frames"
            ms = "" if size.mean_ms is None else f", {size.mean_ms / 1e3:.2f} s a step"
            yield f"faster: {size.width}x{size.height}{frames} ({size.tokens} tokens{ms}): {size.why}"
        for note in self.notes:
            yield f"note: {note}"
        for name, reason in self.untouched.items():
            yield f"untouched: {name} ({reason})"

    def _time_lines(self) -> Iterator[str]:
        t = self.times
        if t is None:
            yield f"no times: {self.untimed}"
            return
        yield f"modelled on {self.device}; errors are those of steps that the rates had not seen:"
        yield f"  stock step {t.stock_ms / 1e3:.2f} s (mean error {t.stock_error:.0%})"
        if t.mean_ms is None or t.speedup is None:
            yield f"  no accelerated time: {t.untimed}"
            return
        sparse = "no step is sparse" if t.sparse_ms is None else f"sparse step {t.sparse_ms / 1e3:.2f} s"
        yield f"  {sparse}, mean of all steps {t.mean_ms / 1e3:.2f} s (mean error {t.accelerated_error:.0%})"
        whole = f"{t.stock_ms * self.steps / 1e3:.0f} s stock, {t.mean_ms * self.steps / 1e3:.0f} s accelerated"
        yield f"  {self.steps} steps: {whole}, {t.speedup:.2f}x"

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=120, color_system=None, highlight=False).print(self)
        return file.getvalue().rstrip()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
