"""Watch runs of the unaccelerated model, and make a profile of what was seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from .._version import __version__
from ..api import RecipeLike, accelerate
from ..call import AttentionCall
from ..config import Made, Profile, Recipe
from ..errors import ConfigError, UnsupportedError
from ..sparsity.plan import Plan
from ..sparsity.planner import Planner
from ..sparsity.recipes import resolve
from . import settle
from .measure import coverage, patterns
from .seen import Seen, cut

ROWS = 256  # queries looked at in a call
WINDOWS = 4  # of the run, for what papers settle at every step
Progress = Callable[[int, int, int], None]


class _Stock(Planner):
    """Let the model's own attention compute every call."""

    def plan(self, call: AttentionCall) -> Plan:
        return Plan(call.q.shape[1], call.k.shape[1])


class Calibration:
    """A context in which a model runs as stock and is watched; `profile()` says what was seen (docs/calibration.md).

    Args:
        target: a pipeline or a transformer, as for `accelerate`; `replace` restores an acceleration it carries.
        recipe: what is calibrated, as for `accelerate`, with `overrides`.
        rows: queries looked at in each attention call.
        windows: parts of the run that are settled apart; by default 4 where the paper settles each step, else 1.
        progress: called as a step begins, with its run and its number, both from 1, and the steps of the run.

    Each run of the model counts as one prompt. A bare transformer needs `handle.step(index, total)` before each call.
    Raises ConfigError for a recipe with nothing to calibrate, and what `accelerate` raises.
    """

    def __init__(
        self,
        target: Any,
        recipe: RecipeLike,
        *,
        rows: int = ROWS,
        windows: int | None = None,
        progress: Progress | None = None,
        replace: bool = False,
        **overrides: Any,
    ) -> None:
        self.recipe = resolve(recipe, **overrides)
        check_calibrates(self.recipe, rows, windows)
        self._choice = self.recipe.heads or self.recipe.search
        self._measure = patterns(self.recipe, self._choice, rows) if self._choice else coverage(rows)
        self._rows = rows
        self._windows = windows or (1 if self.recipe.heads else WINDOWS)
        self._progress = progress
        self._seen = Seen()
        self._at: tuple[int, int | None] | None = None
        self._layouts: dict[str, None] = {}
        self._steps = 1
        neutral = Recipe(name=self.recipe.name, dense_steps=self.recipe.dense_steps)
        self.handle = accelerate(target, neutral, replace=replace)
        self.handle.planner = _Stock(neutral)
        self.handle.watchers = (self._watch,)

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.restore()

    def _watch(self, call: AttentionCall, plan: Plan, out: torch.Tensor) -> None:
        step = call.step
        if (step.run, step.index) != self._at:
            self._at = (step.run, step.index)
            self._steps = step.total or 1
            self._layouts[str(call.layout)] = None
            if self._progress is not None:
                self._progress(step.run, (step.index or 0) + 1, self._steps)
        share = step.index / step.total if step.index is not None and step.total else 0.0
        self._seen.add(call.site.name, step.run, share, self._measure(call))

    def profile(self, prompts: Sequence[str] = ()) -> Profile:
        """Return what the runs so far have shown; `prompts` are written into it. Raises UnsupportedError if nothing."""
        if not self._seen:
            reasons = sorted({row.reason for row in self.handle.report().rows if row.reason}) or ["the model never ran"]
            raise UnsupportedError(f"calibrate: no attention call could be looked at: {'; '.join(reasons)}.")
        windows = cut(self._seen.shares, self._windows, self.recipe.dense_steps)
        sites = [site.name for site in self.handle.sites]
        least = float(getattr(self.recipe.select, "least", 0.0))
        made = Made(
            version=__version__,
            layout=", ".join(self._layouts),
            steps=self._steps,
            prompts=tuple(prompts),
            rows=self._rows,
        )
        return Profile(
            made=made,
            models=tuple(self.handle.models),
            recipe=self.recipe,
            windows=windows,
            options=settle.options(self._seen, sites, windows, self._choice) if self._choice else None,
            floors=None if self._choice else settle.floors(self._seen, sites, windows),
            clamp=None if self._choice else (least, min(2 * least, 1.0)),
        )


def calibrate(
    pipe: Any,
    recipe: RecipeLike,
    prompts: Sequence[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    rows: int = ROWS,
    windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    replace: bool = False,
    **call: Any,
) -> Profile:
    """Run a pipeline as stock on each prompt, and return the profile that a recipe needs for it.

    Args:
        prompts: one or a few, each a run of its own.
        overrides: settings of the recipe, such as `{"density": 0.3}`.
        call: what else the pipeline's call takes, such as `height=512, num_inference_steps=20`.

    The others, and errors, as of `Calibration`. The pipeline is left as it was.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(f"calibrate: expected a list of prompts, got {prompts!r}.")
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        call.setdefault("output_type", "latent")  # nobody looks at the picture
    asked = {"rows": rows, "windows": windows, "progress": progress, "replace": replace}
    with Calibration(pipe, recipe, **asked, **(overrides or {})) as calibration:
        for prompt in prompts:
            pipe(**{"generator": torch.Generator().manual_seed(seed), **call, "prompt": prompt})
        return calibration.profile(prompts)


def check_calibrates(recipe: Recipe, rows: int = ROWS, windows: int | None = None) -> None:
    """Raise ConfigError where a recipe has nothing to calibrate, or the numbers are impossible."""
    if rows < 1 or (windows is not None and windows < 1):
        raise ConfigError(f"calibrate: rows and windows must be at least 1, got {rows} and {windows}.")
    if recipe.cases:
        raise ConfigError(f"recipe {recipe.name!r}: has cases; calibrate its parts as recipes of their own.")
    if recipe.decide_layers:
        raise ConfigError(f"recipe {recipe.name!r}: its layers share decisions, so none can have patterns of its own.")
    choice = recipe.heads or recipe.search
    if choice is not None and choice.given:
        raise ConfigError(f"recipe {recipe.name!r}: its heads are given already, there is nothing to calibrate.")
    least = getattr(recipe.select, "least", None)
    if choice is None and not (isinstance(least, float) and least > 0):
        raise ConfigError(
            f"recipe {recipe.name!r}: has nothing to calibrate; that needs heads, search, or a select with a number "
            "above 0 as its floor, least."
        )
