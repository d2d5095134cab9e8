"""How one transformer is attached and undone, and what is known of the call in progress: instances only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from .call import Site
from .engine import Engine
from .errors import NonFiniteError
from .hosts import Family, LayoutUnknownError, ada_norm
from .hosts.family import bind
from .hosts.generic import attention as intercepted_attention
from .layout import TokenLayout
from .origin import Origin
from .seat import Seat, gradients, stand_in, stand_in_module
from .step import StepInfo, StepTracker

_PARALLEL = "context parallelism is on"
_NO_STEP = StepInfo(run=0, index=None, total=None, branch="0", reason="called outside the transformer's forward")


class Attachment:
    """One transformer under acceleration: its sites, what was there before, and the call in progress."""

    def __init__(
        self, transformer: torch.nn.Module, family: Family, engine: Engine, tracker: StepTracker, prefix: str
    ) -> None:
        self.transformer = transformer
        self.family = family
        self.engine = engine
        self.step = _NO_STEP
        self.layout: TokenLayout | None = None
        self.prompt: Origin | None = None
        self._tracker = tracker
        self._layout_reason = _NO_STEP.reason
        self._memo: dict[str, Any] = {}
        self._finite: torch.Tensor | None = None
        self._watched = _NO_STEP
        self._undo: list[Callable[[], None]] = []
        self._handle: object = None
        self._placed: dict[str, Any] = {}
        self._seats: list[Seat] = []
        self.sites = _named(prefix, family.find_sites(transformer))
        self._cross_sites = _named(prefix, family.find_cross_sites(transformer))
        self.blocked = {site.name: reason for site in self.sites if (reason := _cannot_stand_in(site))}

    # -- attach and undo ------------------------------------------------------------------------------------------
    def attach(self, handle: object = None) -> None:
        """Put the stand-ins and hooks in place; all of them sit on instances. They keep `handle` alive."""
        from .hooks import Hook  # here, so that importing dit_accel stays light

        self._handle = handle
        own = self.family.attention
        for site in self.sites:
            if site.name not in self.blocked:
                known = self.family.knows(site.module.processor)
                self._replace_processor(site, own if own and known else intercepted_attention)
        for site in self._cross_sites:
            assert self.family.cross is not None
            self._replace_processor(site, self.family.cross.attention)
        for place in ada_norm.places(self.transformer, [site for site in self.sites if site.name in self._placed]):
            self._replace_norm(place)
        enter: Any = Hook(self._enter)
        leave: Any = Hook(self._leave)
        before = self.transformer.register_forward_pre_hook(enter, with_kwargs=True)
        after = self.transformer.register_forward_hook(leave, always_call=True)
        self._undo += [before.remove, after.remove]
        if hasattr(self.transformer, "cache_context"):
            self._name_branches()

    def _replace_processor(self, site: Site, attention: Callable[..., Any]) -> None:
        original = site.module.processor
        replacement = stand_in(original, self, site, attention)
        site.module.processor = replacement
        self._placed[site.name] = replacement
        self._seats.append(replacement._dit_accel_seat)

        def undo() -> None:
            if site.module.processor is replacement:  # else the user has put another one there: it stays
                site.module.processor = original

        self._undo.append(undo)

    def _replace_norm(self, place: ada_norm.Place) -> None:
        replacement = stand_in_module(place.module, self, place.site, ada_norm.forward)
        setattr(place.block, place.name, replacement)
        self._seats.append(replacement._dit_accel_seat)

        def undo() -> None:
            if getattr(place.block, place.name, None) is replacement:  # else the user's own stays
                setattr(place.block, place.name, place.module)

        self._undo.append(undo)

    def _name_branches(self) -> None:
        """Learn the branch names that a pipeline gives through `cache_context`, by an instance attribute."""
        transformer: Any = self.transformer
        previous = vars(transformer).get("cache_context")
        named = _NamedContext(transformer, transformer.cache_context, self._tracker)
        transformer.cache_context = named

        def undo() -> None:
            if vars(transformer).get("cache_context") is not named:
                return
            if previous is None:
                del transformer.cache_context
            else:
                transformer.cache_context = previous

        self._undo.append(undo)

    def detach(self) -> None:
        """Put everything back, last change first."""
        while self._undo:
            self._undo.pop()()
        for seat in self._seats:
            seat.live = False
        self._handle = None
        self._seats.clear()
        self._placed.clear()
        self._memo.clear()

    # -- around one forward ---------------------------------------------------------------------------------------
    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        arguments = bind(module, args, kwargs)
        self._raise_if_not_finite()
        self.step = self._tracker.observe(module, _timestep(arguments))
        try:
            self.layout, self._layout_reason = self.family.geometry(module, arguments, self._memo), ""
        except LayoutUnknownError as error:
            self.layout, self._layout_reason = None, str(error)
        self.prompt = self.family.cross.prompt(module, arguments) if self.family.cross else None
        latents = arguments.get("hidden_states")
        self.engine.ledger.begin_forward(self.step, self.layout, _device(latents))
        for site in self.sites:
            if self._placed.get(site.name, site.module.processor) is not site.module.processor:
                self.engine.ledger.note_dense(site, self.step, "its processor was replaced after accelerate()")
        self._watch(latents)

    def _leave(self, *_: Any) -> None:
        for seat in self._seats:
            if seat.inlined:
                self.engine.ledger.note_dense(seat.site, self.step, seat.inlined)
                seat.inlined = ""
        self.engine.ledger.end_forward()
        self.step, self.layout, self._layout_reason, self.prompt = _NO_STEP, None, _NO_STEP.reason, None

    def _watch(self, latents: Any) -> None:
        """Check the latents for NaN and Inf; on a GPU the answer is read at the next call, to not wait for it."""
        if not isinstance(latents, torch.Tensor) or latents.device.type == "meta":
            return
        self._finite = torch.isfinite(latents).all()
        self._watched = self.step
        if latents.device.type == "cpu":
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        step = self._watched
        where = "the latents handed in" if not step.index else f"the latents after step {step.index - 1}"
        raise NonFiniteError(
            f"{where} hold NaN or Inf (run {step.run}, branch {step.branch}, recipe {self.engine.recipe.name!r}). "
            "Try another dtype (bfloat16 or float32), or restore() to see whether the stock pipeline does it too."
        )

    def dense_reason(self, site: Site, x: torch.Tensor, length: int | None = None) -> str:
        """Say why a call stays dense before its queries are known, '' if it does not.

        `x` is any tensor of the call, `length` the tokens of its sequence where already known.
        """
        if self.layout is None:
            return self._layout_reason
        if getattr(site.module.processor, "_parallel_config", None) is not None:
            return _PARALLEL
        if length is not None and length != self.layout.length:
            return f"a sequence of {length} tokens is not the layout's {self.layout.length}"
        return gradients(x) or self.engine.planner.dense_reason(site, self.step, self.layout, x.device)


class _NamedContext:
    """The transformer's `cache_context`, with the name also told to the tracker; a copy or a pickle is stock's."""

    def __init__(self, transformer: torch.nn.Module, original: Any, tracker: StepTracker) -> None:
        self._transformer = transformer
        self._original = original
        self._tracker = tracker

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        self._tracker.enter_context(name)
        try:
            with self._original(name, **kwargs):
                yield
        finally:
            self._tracker.enter_context(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _stock_context(memo.get(id(self._transformer), self._transformer))

    def __reduce__(self) -> Any:
        return _stock_context, (self._transformer,)


def _stock_context(transformer: Any) -> MethodType:
    return MethodType(type(transformer).cache_context, transformer)


def _named(prefix: str, sites: list[Site]) -> list[Site]:
    return [
        replace(site, name=prefix + site.name, group=prefix + site.group, count=len(sites), model=prefix)
        for site in sites
    ]


def _cannot_stand_in(site: Site) -> str:
    if isinstance(site.module.processor, torch.nn.Module):
        return f"its processor {type(site.module.processor).__name__} has weights of its own"
    return "" if getattr(site.module.processor, "_parallel_config", None) is None else _PARALLEL


def _device(value: Any) -> torch.device:
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _timestep(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    value = next((arguments[name] for name in ("timestep", "timesteps", "t") if name in arguments), None)
    return value if isinstance(value, torch.Tensor) else None
