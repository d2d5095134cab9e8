"""Which run, step and guidance branch a transformer call belongs to, read from the pipeline itself."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError


@dataclass(frozen=True)
class StepInfo:
    """Where in the denoising loop one transformer call stands.

    `index` counts from 0 and is None when it could not be had, with the `reason`. `branch` is "0", "1", ... for the
    calls within one step, or the name the pipeline gives them ("cond", "uncond"). `sigma` is the noise level in the
    units of the model's own schedulers: the share of noise for flow models (from 1 to 0), noise over signal for others
    (infinite where a run begins with noise alone); None in a loop of the user's own.
    """

    run: int
    index: int | None
    total: int | None
    branch: str
    sigma: float | None = None
    reason: str = ""


_UNKNOWN = "no step known: {}call handle.step(index, total) in your loop"


class StepTracker:
    """Follow one pipeline's denoising loop without patching it.

    A run is new when `scheduler.timesteps` is another tensor object, which every `set_timesteps` makes, so a
    cancelled run leaves nothing behind. The scheduler is looked up at each call because users swap it. What a user's
    own loop said counts until the pipeline's scheduler moves on by itself.
    """

    def __init__(self, pipe: Any | None) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._timesteps: weakref.ref[torch.Tensor] | None = None
        self._sigmas: list[float] = []
        self._manual: tuple[int, int, str | None] | None = None
        self._stood: tuple[Any, ...] = ()  # where the scheduler stood when the user's loop last said its step
        self._calls: dict[int, int] = {}
        self._index: int | None = None
        self._context: str | None = None
        self.run = 0

    def set_manual(self, index: int, total: int, branch: str | None) -> None:
        """Take the step from the user's own loop; index 0 after a later one starts a new run."""
        if not 0 <= index < total:
            raise ConfigError(f"step: index must lie in 0..{total - 1}, got {index}.")
        if self._manual is None or (index, total) != self._manual[:2]:
            if self._manual is None or index < self._manual[0] or total != self._manual[1]:
                self.run += 1
            self._calls.clear()
        self._manual = (index, total, branch)
        self._stood = _standing(self._scheduler())

    def enter_context(self, name: str | None) -> None:
        """Note the name the pipeline gave to the coming call through `cache_context`."""
        self._context = name

    def observe(self, model: torch.nn.Module, timestep: torch.Tensor | None) -> StepInfo:
        """Return where the call stands that `model` is about to make, and count it."""
        scheduler = self._scheduler()
        if self._manual is not None and self._stood != _standing(scheduler):
            self._manual = None
        if self._manual is not None:
            index, total, branch = self._manual
            return StepInfo(self.run, index, total, branch or self._count(model))
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or not isinstance(timesteps, torch.Tensor) or timesteps.ndim == 0:
            return self._unknown(model, "")
        if self._timesteps is None or self._timesteps() is not timesteps:
            self._timesteps = weakref.ref(timesteps)
            self._sigmas = _sigmas(scheduler, timesteps)
            self.run += 1
            self._index = None
            self._calls.clear()
        if _was_never_set(scheduler, timesteps):
            return self._unknown(model, "the pipeline's scheduler has not been set to any steps; ")
        begin = getattr(scheduler, "_begin_index", None) or 0
        raw = self._raw_index(scheduler, timesteps, timestep, begin)
        if raw >= len(timesteps):
            return self._unknown(model, "the pipeline's scheduler has no step left; ")
        index = raw - begin
        if index != self._index:
            self._index = index
            self._calls.clear()
        branch = self._count(model)
        sigma = self._sigmas[raw] if raw < len(self._sigmas) else None
        return StepInfo(self.run, index, len(timesteps) - begin, self._context or branch, sigma)

    def _scheduler(self) -> Any:
        return getattr(self._pipe() if self._pipe else None, "scheduler", None)

    def _unknown(self, model: torch.nn.Module, why: str) -> StepInfo:
        return StepInfo(self.run, None, None, self._count(model), reason=_UNKNOWN.format(why))

    def _count(self, model: torch.nn.Module) -> str:
        nth = self._calls.get(id(model), 0)
        self._calls[id(model)] = nth + 1
        return str(nth)

    def _raw_index(self, scheduler: Any, timesteps: torch.Tensor, timestep: torch.Tensor | None, begin: int) -> int:
        if hasattr(scheduler, "_step_index"):
            return begin if scheduler._step_index is None else int(scheduler._step_index)
        # Schedulers without a counter (DDIM): find the timestep. One host read a step, on those schedulers only.
        if timestep is None:
            return begin
        # Where each token has its own (Wan 2.2 5B), tokens of a given picture stand at 0: the largest is the step's.
        value = timestep.max().to(timesteps.device, torch.float64)
        return int((timesteps.to(torch.float64) - value).abs().argmin())


def _standing(scheduler: Any) -> tuple[Any, ...]:
    """Return what changes when a scheduler is swapped, set or stepped; its tensor of steps counts as an object."""
    return id(scheduler), id(getattr(scheduler, "timesteps", None)), getattr(scheduler, "_step_index", None)


def _was_never_set(scheduler: Any, timesteps: torch.Tensor) -> bool:
    """Say whether a scheduler is as it was made, holding every step it was trained on."""
    if any(getattr(scheduler, name, None) is not None for name in ("num_inference_steps", "_step_index")):
        return False
    return len(timesteps) == getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)


def _sigmas(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """Return the noise level at each step, read once a run; schedulers without one (DDIM) know the share of signal."""
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor):
        return sigmas.tolist()
    signal = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(signal, torch.Tensor):
        return []
    signal = signal.to("cpu", torch.float64)[timesteps.to("cpu", torch.int64)]
    return ((1 - signal) / signal).sqrt().tolist()
