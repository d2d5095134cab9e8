"""One attention call against what it should have been: asked before a run, filled by it, as figures and a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .call import AttentionCall, Site
from .engine import Engine
from .errors import ConfigError, NotSeenError
from .layout import TokenLayout
from .sparsity import panels
from .sparsity.draw import Cell
from .sparsity.plan import Plan
from .step import StepInfo
from .truth import Measured, measure, weights

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

HEADINGS = "computed, true attention, best choice of as many pairs, over block pairs (rows: queries)"
KEYS = "; the same for the keys of the red query on the grid"
LEGEND = f"true attention: black is 1/{panels.MOST} of even attention and less, white {panels.MOST} times and more"


@dataclass(frozen=True, eq=False)
class KeyMaps:
    """Which keys of the main grid one query has, float32 [B, H, frames, height, width] each, on the CPU.

    `chosen`: 1 where the pair was computed. `attention`: the true softmax weight. `oracle`: the share of the key's
    block that the best choice takes. `tokens`: keys of the whole call, text included.
    """

    query: Cell
    tokens: int
    chosen: torch.Tensor
    attention: torch.Tensor
    oracle: torch.Tensor


@dataclass(frozen=True, eq=False)
class Explained:
    """One call of the site at the step, in one guidance branch.

    `reason` says why nothing was chosen: it ran dense, or by an operator that computes no pairs. Only where it is ''
    there are figures, [samples, heads] each, and `maps` over block pairs. `keys` is None where the asked query lies
    outside the grid.
    """

    branch: str
    layout: TokenLayout | None = None
    reason: str = ""
    maps: Measured | None = None
    keys: KeyMaps | None = None

    @property
    def density(self) -> torch.Tensor:
        """Computed over possible pairs."""
        return self._seen.density

    @property
    def recall(self) -> torch.Tensor:
        """Share of the true softmax mass on the computed pairs."""
        return self._seen.recall

    @property
    def lost(self) -> torch.Tensor:
        """Share of the true softmax mass on the pairs left out."""
        return 1 - self._seen.recall

    @property
    def best_recall(self) -> torch.Tensor:
        """The most that any choice of as many pairs among the plan's blocks could keep."""
        return self._seen.best_recall

    @property
    def error(self) -> torch.Tensor:
        """Norm of (output - true output) over the norm of the true output."""
        return self._seen.error

    @property
    def _seen(self) -> Measured:
        if self.maps is None:
            raise NotSeenError(f"branch {self.branch}: nothing was chosen ({self.reason}).")
        return self.maps

    def to_dict(self) -> dict[str, Any]:
        """Return branch, layout, reason and figures as plain data, [samples][heads]."""
        said = {"branch": self.branch, "layout": str(self.layout) if self.layout else None, "reason": self.reason}
        if self.maps is None:
            return said
        names = ("density", "recall", "lost", "best_recall", "error")
        return {**said, **{name: getattr(self, name).tolist() for name in names}}


class Explanation:
    """What `handle.explain` returns: empty until a run reaches the step, then what that run did there.

    It stops watching when a later run begins, where looking fails, at `close()`, or at the end of its `with` block.
    """

    def __init__(self, engine: Engine, site: Site, step: int, query: Cell | None = None) -> None:
        if step < 0:
            raise ConfigError(f"explain: step counts from 0, got {step}.")
        self.site, self.step, self.recipe = site, step, engine.recipe.name
        self._query = query
        self._engine = engine
        self._calls: list[Explained] = []
        self._run: int | None = None
        self._last: StepInfo | None = None
        engine.watchers += (self._watch,)
        engine.ledger.listeners += (self._hear,)

    @property
    def calls(self) -> tuple[Explained, ...]:
        """The calls of the site at the step, in the order they ran; NotSeenError where none has."""
        if not self._calls:
            raise NotSeenError(f"explain: no call of {self.site.name} at step {self.step} has run; {self._seen()}.")
        return tuple(self._calls)

    def close(self) -> None:
        """Stop watching; what was seen stays."""
        self._engine.watchers = tuple(w for w in self._engine.watchers if w != self._watch)
        self._engine.ledger.listeners = tuple(w for w in self._engine.ledger.listeners if w != self._hear)

    # -- while a run goes on --------------------------------------------------------------------------------------
    def _watch(self, call: AttentionCall, plan: Plan, out: torch.Tensor) -> None:
        full = plan.dense or plan.measures  # the ledger has said so already
        if not self._is_asked(call.site, call.step) or full:
            return
        if plan.operator:
            reason = f"{plan.operator} is an operator, which computes no pairs"
            self._calls.append(Explained(call.step.branch, call.layout, reason))
            return
        try:
            maps = measure(call, plan, out)
            keys = _keys(call, plan, maps, self._query)
        except BaseException:
            self.close()  # it stops this run: it must not stop every later one
            raise
        self._calls.append(Explained(call.step.branch, call.layout, maps=maps, keys=keys))

    def _hear(self, site: Site, step: StepInfo, reason: str, layout: TokenLayout | None) -> None:
        if self._is_asked(site, step):
            self._calls.append(Explained(step.branch, layout, reason))

    def _is_asked(self, site: Site, step: StepInfo) -> bool:
        if self._calls and step.run != self._run:
            self.close()
            return False
        self._run, self._last = step.run, step
        return site.name == self.site.name and step.index == self.step

    def _seen(self) -> str:
        if self._last is None:
            return "nothing has: run the pipeline first"
        if self._last.index is None:
            return self._last.reason
        return f"the last call seen was at step {self._last.index} of {self._last.total}, counted from 0"

    # -- what it came to ------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        asked = {"site": self.site.name, "step": self.step, "recipe": self.recipe}
        return {**asked, "calls": [call.to_dict() for call in self.calls]}

    def draw(self, *, sample: int = 0, heads: Sequence[int] | None = None) -> Image.Image:
        """Draw a row for each head of each branch that ran sparse: three maps over block pairs, three over the grid.

        Raises NotSeenError where no branch did, ConfigError where there is no such sample or head, or the query lies
        outside the grid.
        """
        sparse = [call for call in self.calls if call.maps is not None]
        if not sparse:
            raise NotSeenError(f"explain: there is nothing to draw, no call chose pairs ({self.calls[0].reason}).")
        rows = [(f"{self.recipe}: {self.site.name} at step {self.step}", ()), (HEADINGS + KEYS, ()), (LEGEND, ())]
        return panels.page([*rows, *(row for call in sparse for row in self._rows(call, sample, heads))])

    def _rows(
        self, call: Explained, sample: int, heads: Sequence[int] | None
    ) -> Iterator[tuple[str, Sequence[Image.Image]]]:
        maps, keys = call._seen, call.keys
        samples, several = maps.recall.shape
        if keys is None:
            grid = "x".join(map(str, call.layout.main.shape)) if call.layout else "unknown size"
            raise ConfigError(f"explain: the query {self._query} lies outside the grid of {grid} tokens.")
        for head in range(several) if heads is None else heads:
            if not (0 <= head < several and 0 <= sample < samples):
                raise ConfigError(
                    f"explain: the call has {samples} samples and {several} heads, counted from 0; "
                    f"sample {sample}, head {head} was asked for."
                )
            yield _caption(call, sample, head), [*_block_maps(maps, sample, head), *_grid_maps(keys, sample, head)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()
        for call in self.calls:
            if call.reason:
                yield f"branch {call.branch}: nothing was chosen ({call.reason})"

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(title=f"{self.recipe}: {self.site.name} at step {self.step}", box=box.SIMPLE)
        for name in ("branch", "sample", "head", "density", "recall", "best recall", "lost", "output error"):
            table.add_column(name, justify="left" if name == "branch" else "right")
        for call in self.calls:
            if call.maps is None:
                continue
            figures = torch.stack([call.density, call.recall, call.best_recall, call.lost, call.error], -1)
            for i, sample in enumerate(figures.tolist()):
                for j, head in enumerate(sample):
                    table.add_row(call.branch, str(i), str(j), *(f"{value:.4f}" for value in head))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=120, color_system=None).print(self)
        return file.getvalue().rstrip()

    def __enter__(self) -> Explanation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _keys(call: AttentionCall, plan: Plan, maps: Measured, query: Cell | None) -> KeyMaps | None:
    """Look at the keys of one query on the main grid, the middle one where none is named."""
    shape = call.layout.main.shape
    cell = query or (shape[0] // 2, shape[1] // 2, shape[2] // 2)
    if any(not 0 <= at < size for at, size in zip(cell, shape, strict=True)):
        return None
    start = next(start for start, segment in call.layout.spans() if segment is call.layout.main)
    grid = slice(start, start + call.layout.main.length)
    token = torch.tensor([start + int(np.ravel_multi_index(cell, shape))], device=call.q.device)
    b, h = maps.recall.shape
    ((_, attention),) = weights(replace(call, q=call.q[:, token]))
    chosen = torch.stack([plan.rows(token, i, j)[0] for i in range(b) for j in range(h)]).view(b, h, -1)
    row = maps.q_block[..., token.cpu()].expand(b, h, 1)
    of_query = maps.oracle.gather(2, row[..., None].expand(-1, -1, -1, maps.oracle.shape[-1]))[:, :, 0]
    oracle = of_query.gather(-1, maps.k_block.expand(b, h, -1))
    shaped = (x[..., grid].float().cpu().unflatten(-1, shape) for x in (chosen, attention[:, :, 0], oracle))
    return KeyMaps(cell, call.k.shape[1], *shaped)


def _caption(call: Explained, sample: int, head: int) -> str:
    figures = (x[sample, head] for x in (call.density, call.recall, call.best_recall, call.error))
    density, recall, best, error = (float(x) for x in figures)
    return (
        f"branch {call.branch}, sample {sample}, head {head}: density {density:.3f}, recall {recall:.3f} of {best:.3f} "
        f"possible, output error {error:.3f}"
    )


def _block_maps(maps: Measured, sample: int, head: int) -> list[Image.Image]:
    """Draw a head's blocks that hold tokens; per-head cuts have spare ones."""
    rows, cols = (maps.pairs[sample, head].sum(axis) > 0 for axis in (1, 0))

    def used(x: torch.Tensor) -> np.ndarray:
        return x[sample, head][rows][:, cols].numpy()

    even = used(maps.pairs) / maps.k_block.shape[-1]
    chosen, oracle = (panels.share_colours(used(x)) for x in (maps.chosen, maps.oracle))
    return [panels.block_map(x) for x in (chosen, panels.mass_colours(used(maps.mass) / even), oracle)]


def _grid_maps(keys: KeyMaps, sample: int, head: int) -> list[Image.Image]:
    chosen, attention, oracle = (x[sample, head].numpy() for x in (keys.chosen, keys.attention, keys.oracle))
    colours = (panels.share_colours(chosen), panels.mass_colours(attention * keys.tokens), panels.share_colours(oracle))
    return [panels.grid_map(x, keys.query) for x in colours]
