"""A plan before the run: what the engine will do on a model at a size, and what that takes, without any weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..api import RecipeLike
from ..config import Recipe
from ..errors import ConfigError
from ..layout import TokenLayout
from ..report import ranges
from ..sparsity.correct import MEASURES
from ..sparsity.crossover import crossover_tokens
from ..sparsity.recipes import resolve
from ..sparsity.state import state_bytes
from .models import main_dtype
from .nearby import Fit, better
from .result import Memory, Row, RunPlan, Size, Times
from .subject import Subject, subject
from .survey import Survey, Treatment, notes, plan_bytes, survey, treatments
from .target import CPU, Target, target
from .times import Clock, UnmeasuredError


def plan(
    model: Any,
    *,
    height: int,
    width: int,
    frames: int | None = None,
    recipe: RecipeLike = "balanced",
    steps: int | None = None,
    text_length: int | None = None,
    device: str | None = None,
    **overrides: Any,
) -> RunPlan:
    """Say what an accelerated run will do and take, without weights: nothing is computed, nothing of the model changed.

    Args:
        model: a pipeline, a transformer (on any device, also "meta"), a folder in diffusers' format, or a name.
        height, width: pixels; `frames` of a clip.
        recipe: as `accelerate` takes it, with `overrides` such as `density=0.2`.
        steps: denoising steps; without, those of the model's pipeline, or 50.
        text_length: tokens of the prompt; without, as the family's pipeline has it.
        device: "cpu", "cuda", or a measured GPU by name or part of it ("h100"). Without: where the model lies, else
            this machine's GPU, else the measured one.

    Raises ConfigError and UnsupportedError.
    """
    settled = resolve(recipe, **overrides)
    counts = {"height": height, "width": width, "frames": frames, "steps": steps, "text_length": text_length}
    for name, value in counts.items():
        optional = value is None and name not in ("height", "width")
        if not optional and (type(value) is not int or value < 1):
            raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}.")
    made = subject(model)
    where = target(device, made.device)
    cells = made.cells(height, width, frames)
    planner = _Planning(made, settled, made.steps if steps is None else steps, text_length, where)
    seen = planner.look(cells)
    whole = planner.described(seen, height, width, frames)
    return replace(whole, faster=planner.faster(seen, whole))


@dataclass(frozen=True)
class _Planning:
    subject: Subject
    recipe: Recipe
    steps: int
    text: int | None
    target: Target

    def look(self, cells: tuple[int, int, int]) -> Survey:
        """Walk the twin at a size."""
        s = self.subject
        text = s.inputs.text if self.text is None else self.text
        arguments = s.inputs.make(s.twin.config, cells, text, CPU, main_dtype(s.twin))
        try:
            return survey(s.given, s.twin, s.family, self.recipe, arguments)
        except RuntimeError as error:  # such as a size beyond the positions that the model knows
            raise ConfigError(f"{s.name} itself does not run at this size: {str(error).splitlines()[0]}.") from error

    def described(self, seen: Survey, height: int, width: int, frames: int | None) -> RunPlan:
        """Put everything but other sizes together."""
        treated = treatments(seen, self.recipe, self.steps, self.target.kind)
        times, untimed = self._times(seen, treated)
        return RunPlan(
            model=self.subject.name,
            device=self.target.name,
            recipe=self.recipe.name,
            height=height,
            width=width,
            frames=frames,
            steps=self.steps,
            layout=seen.unknown if seen.layout is None else str(seen.layout),
            rows=tuple(_rows(treated, self.steps)),
            density=_overall(treated, seen.layout),
            matmul_flops=seen.work.matmul,
            attention_flops=seen.work.pairs,
            memory=self._memory(seen, treated),
            times=times,
            untimed=untimed,
            notes=self._notes(seen, treated, times),
            untouched=seen.blocked,
        )

    def _times(self, seen: Survey, treated: Sequence[Treatment]) -> tuple[Times | None, str]:
        if self.target.measured is None:
            return None, f"no step was measured on {self.target.name}; `eval/bench_step.py` there, then `bench_plan`"
        clock = Clock(self.target.measured)
        try:
            stock = clock.stock_ms(seen)
        except UnmeasuredError as error:
            return None, str(error)
        source = {"gpu": clock.device.gpu, **clock.device.source}
        errors = (clock.error.stock, clock.error.accelerated)
        by_step = defaultdict[int, list[Treatment]](list)
        for one in treated:
            by_step[one.step].append(one)
        try:
            spent = [
                (clock.step_ms(seen, by_step[i]), any(not t.reason for t in by_step[i])) for i in range(self.steps)
            ]
        except UnmeasuredError as error:
            return Times(stock, None, None, str(error), *errors, source), ""
        sparse = [ms for ms, is_sparse in spent if is_sparse]
        mean = fmean(ms for ms, _ in spent)
        return Times(stock, fmean(sparse) if sparse else None, mean, "", *errors, source), ""

    def _memory(self, seen: Survey, treated: Sequence[Treatment]) -> Memory:
        """Add up the bytes; a site keeps what its most demanding sparse call declares."""
        size = main_dtype(self.subject.twin).itemsize
        state: dict[str, int] = defaultdict(int)
        for one in {(t.site.name, t.recipe, t.call): t for t in treated if not t.reason}.values():
            assert one.call is not None
            call = one.call
            kept = state_bytes(one.recipe, call.layout, call.batch, call.heads, call.dim, size)
            state[one.site.name] = max(state[one.site.name], kept)
        shared = {(t.recipe, t.call): t for t in treated if t.call is not None and not t.reason}
        plans = sum(plan_bytes(recipe, call.layout, call.heads) for recipe, call in shared if call is not None)
        activations = max(seen.work.peak, seen.ours.peak)
        return Memory(self.subject.weights, activations, sum(state.values()) + plans, seen.text_bytes)

    def _notes(self, seen: Survey, treated: Sequence[Treatment], times: Times | None) -> tuple[str, ...]:
        found = dict[str, None]()
        for recipe, call in {(t.recipe, t.call): None for t in treated if not t.reason}:
            assert call is not None
            if note := notes(recipe, call.layout, call.heads):
                found[note] = None
        sparse = {t.recipe: None for t in treated if not t.reason}
        clock = None if self.target.measured is None else Clock(self.target.measured)
        timed = times is not None and times.mean_ms is not None
        if clock and timed and any(r.content_driven and not clock.decides_alike(r) for r in sparse):
            found[f"times are without decisions: only those of {clock.device.recipe!r} were timed in a step"] = None
        if self.recipe.adaptive and seen.layout is not None and not sparse:
            least = crossover_tokens(self.recipe.density, self.target.kind)
            if least is not None:
                found[f"sparse is faster on {self.target.kind.type} from about {least} tokens on"] = None
        if self.subject.several:
            found["of several transformers the first is planned; weights are those of all"] = None
        return tuple(found)

    def faster(self, seen: Survey, here: RunPlan) -> tuple[Size, ...]:
        """Return sizes nearby that fill their tiles better and, where times are known, take less."""
        sparse = [t for t in treatments(seen, self.recipe, self.steps, self.target.kind) if not t.reason]
        if not sparse or seen.layout is None:
            return ()
        main = seen.layout.main
        made = list[Size]()
        for one in better(main, sparse[-1].recipe):
            with suppress(ConfigError):  # what the model does not run at is no size to name
                made.append(self._size(one, seen.layout, here.frames))
        ms = None if here.times is None else here.times.mean_ms
        return tuple(size for size in made if ms is None or size.mean_ms is None or size.mean_ms < ms)

    def _size(self, one: Fit, layout: TokenLayout, frames: int | None) -> Size:
        s, (f, h, w) = self.subject, one.grid
        height, width = h * s.unit, w * s.unit
        if frames is not None and s.time is not None and f != layout.main.frames:
            frames = (f - 1) * s.time + 1
        seen = self.look(s.cells(height, width, frames))
        there = self.described(seen, height, width, frames)
        ms = None if there.times is None else there.times.mean_ms
        tile = "x".join(map(str, one.tile))
        why = f"{one.padding:.2f} slots a token in tiles of {tile}"
        tokens = layout.length if seen.layout is None else seen.layout.length
        return Size(height, width, frames, tokens, one.padding, ms, why)


def _rows(treated: Sequence[Treatment], steps: int) -> list[Row]:
    """Group treatments that are alike, and write their steps as ranges."""
    groups = defaultdict[Any, list[Treatment]](list)
    for one in treated:
        asked = None if one.reason else one.recipe.density
        groups[one.site.group, one.reason, one.call, asked, one.density].append(one)
    rows = []
    for (group, reason, call, asked, density), members in groups.items():
        at = sorted({one.step for one in members})
        rows.append(
            Row(
                group=group,
                steps=ranges(at),
                share=len(at) / steps,
                sites=round(len(members) / len(at)),
                kind="dense" if reason else "sparse",
                reason=reason,
                layout="" if call is None else str(call.layout),
                tokens=None if call is None else call.layout.length,
                heads=None if call is None else call.heads,
                dim=None if call is None else call.dim,
                asked=asked,
                density=density,
            )
        )
    return rows


def _overall(treated: Sequence[Treatment], layout: TokenLayout | None) -> float | None:
    """Return the density over all calls, dense ones counted as 1; None where the attention decides some."""
    computed = possible = 0.0
    for one in treated:
        here = layout  # by which the engine counts a call that its planner did not see
        if one.call is not None and one.reason in ("", MEASURES):
            here = one.call.layout
        pairs = 1.0 if here is None else float(here.length**2)
        if one.density is None:
            return None
        computed, possible = computed + one.density * pairs, possible + pairs
    return computed / possible if possible else 1.0
