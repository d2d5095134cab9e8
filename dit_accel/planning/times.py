"""What a call and a step take on a measured device, as far as it was measured; what was not is said, not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..config import CentroidCorrect, Recipe
from ..sparsity.decide import tiling_for
from ..sparsity.recipes import resolve
from ..sparsity.tiling import Tiling
from .rates import Device, Rates, Sparse, leave_one_out, mean_error
from .survey import Reached, Survey, Treatment
from .work import Attention

REACH = 1.25  # how far beyond the measured lengths, as a factor


class UnmeasuredError(Exception):
    """No measured row speaks for this; the message says what is missing."""


@dataclass(frozen=True)
class Error:
    """Mean absolute error of the model as a share, each measured case modelled from the others alone."""

    stock: float
    accelerated: float


@dataclass(frozen=True)
class Clock:
    """The times of one measured device."""

    device: Device

    @cached_property
    def rates(self) -> Rates:
        return Rates.fit(self.device.cases)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe whose steps were measured."""
        return resolve({"base": self.device.recipe, **self.device.settings})

    @cached_property
    def error(self) -> Error:
        """How far off the model was of steps it had not seen."""
        judged = leave_one_out(self.device.cases)
        stock, ours = (mean_error(j for j in judged if (j.density is None) is kind) for kind in (True, False))
        return Error(stock, ours)

    def stock_ms(self, seen: Survey) -> float:
        """Return the time of a step as it comes; UnmeasuredError where it is not of a kind that was measured."""
        calls = [call for calls in seen.work.attention.values() for call in calls]
        return self.rates.rest_ms(seen.work.matmul, seen.work.traffic) + sum(map(self.dense_ms, calls))

    def dense_ms(self, call: Attention) -> float:
        """Return the time of a dense attention; UnmeasuredError beyond the measured lengths and head dimensions."""
        lengths = [case.tokens for case in self.device.cases]
        if not min(lengths) / REACH <= call.keys <= max(lengths) * REACH:
            raise UnmeasuredError(
                f"{call.keys} tokens: steps were measured from {min(lengths)} to {max(lengths)} tokens on this device"
            )
        dims = sorted({case.dim for case in self.device.cases})
        if call.dim not in dims:
            raise UnmeasuredError(f"heads of {call.dim} channels: only {dims} were measured on this device")
        return call.batch * self.rates.dense_ms(call.flops / call.batch, call.keys, call.masked)

    def sparse_ms(self, one: Treatment) -> float:
        """Return the time of a sparse call and its decision; UnmeasuredError where more than these is done."""
        assert one.call is not None
        why = _untimed(one.recipe, self.recipe)
        if why or one.density is None:
            raise UnmeasuredError(
                why or f"{one.recipe.name!r}: its density follows from the attention; ask for a density"
            )
        call = sparse_call(one.recipe, one.call, one.density)
        decided = self.rates.decision_ms(call, one.recipe.every) if self.decides_alike(one.recipe) else 0.0
        return one.call.batch * (self.rates.kernel_ms(call) + decided)

    def decides_alike(self, recipe: Recipe) -> bool:
        """Say whether a recipe decides as the measured one does, on units of whatever size."""
        base = self.recipe
        return (recipe.order.kind, recipe.score, recipe.select.kind) == (base.order.kind, base.score, base.select.kind)

    def step_ms(self, seen: Survey, treated: Sequence[Treatment]) -> float:
        """Return the time of one step whose calls are treated so; UnmeasuredError as of its parts."""
        work = seen.ours if any(not one.reason for one in treated) else seen.work
        spent = self.rates.rest_ms(work.matmul, work.traffic)
        left: dict[str, list[Attention]] = {name: list(calls) for name, calls in seen.work.attention.items()}
        for one in treated:
            stock = left[one.site.name].pop(0)
            spent += self.dense_ms(stock) if one.reason else self.sparse_ms(one)
        return spent + sum(self.dense_ms(call) for calls in left.values() for call in calls)  # blocked sites


def sparse_call(recipe: Recipe, call: Reached, density: float) -> Sparse:
    """Return what one sparse call of a sample does in the recipe's cut."""
    tiling = tiling_for(recipe, call.layout)
    return Sparse(
        density, len(tiling.slots), tiling.units, whole(tiling), call.heads, call.dim, pooled_keys(recipe, tiling)
    )


def pooled_keys(recipe: Recipe, tiling: Tiling) -> int:
    """Return how many mean keys stand for what is skipped."""
    return tiling.units * tiling.key_parts if isinstance(recipe.correct, CentroidCorrect) else 0


def whole(tiling: Tiling) -> bool:
    """Say whether no kernel block holds a hole among tokens."""
    keys = tiling.on(torch.device("cpu")).cut.k
    return keys.identity or keys.whole


def _untimed(recipe: Recipe, measured: Recipe) -> str:
    """Say what a recipe does beside kernel and decision, which the step benchmark did not time."""
    extra: Mapping[str, bool] = {
        "a correction": recipe.correct not in (None, measured.correct),
        "heads that choose": recipe.heads is not None,
        f"precision {recipe.precision}": recipe.precision != "as given",
        "decisions at set times": bool(recipe.decide_at),
        "decisions shared by layers": bool(recipe.decide_layers),
        "decisions on drift": recipe.drift is not None,
        "an order by content": recipe.order.kind in ("kmeans", "importance"),
        "agent tokens": recipe.select.kind == "agents",
        "shapes exact to the token": recipe.select.kind == "disk" or getattr(recipe.select, "per", "") == "token",
    }
    found = [what for what, used in extra.items() if used]
    return f"{recipe.name!r}: {', '.join(found)} was not timed in a step" if found else ""
