"""A stand-in for one attention module's processor, in eager and in compiled code."""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .call import Site
from .engine import Engine
from .layout import TokenLayout

if TYPE_CHECKING:
    from .attachment import Attachment

_NUMBERS = itertools.count()
_SEATS: weakref.WeakValueDictionary[int, Seat] = weakref.WeakValueDictionary()


class Seat:
    """What a stand-in knows of its place; to hosts' attention functions the host, while torch.compile traces them.

    Compiled code holds nothing of it but `number`, an int64 scalar tensor: a Python number would be baked in, and every
    layer compiled anew. `inlined` says why a traced call ran the stock processor, until the ledger has written it down.
    """

    layout: TokenLayout | None = None  # what a traced call may not know: it changes between steps and sizes

    def __init__(self, original: Any, host: Attachment, site: Site) -> None:
        self.original = original
        self.host = host
        self.site = site
        self.engine: Engine = host.engine
        self.live = True
        self.inlined = ""
        key = next(_NUMBERS)
        with torch.inference_mode(False):
            self.number = torch.tensor(key, device="cpu")
        _SEATS[key] = self

    def dense_reason(self, site: Site, x: torch.Tensor, length: int | None = None) -> str:
        """Say why a traced call must be stock's own: what can be known before it runs."""
        return gradients(x)


def seat_of(number: torch.Tensor) -> Seat:
    """Return the seat that compiled code names; KeyError when its model is gone."""
    return _SEATS[int(number)]


def gradients(x: torch.Tensor) -> str:
    """Say that a call needs a backward pass, '' if it does not."""
    return "gradients are asked for" if torch.is_grad_enabled() and x.requires_grad else ""


def stand_in(original: Any, host: Attachment, site: Site, attention: Callable[..., Any]) -> Any:
    """Make a processor of a subclass that shares the original's attributes and calls the engine.

    Sharing `__dict__` keeps what the user sets meanwhile (`_attention_backend`, `_parallel_config`).
    """
    replacement = object.__new__(_subclass(type(original), attention))
    replacement.__dict__ = original.__dict__
    replacement._dit_accel_seat = Seat(original, host, site)
    return replacement


def stand_in_module(original: torch.nn.Module, host: Attachment, site: Site, forward: Callable[..., Any]) -> Any:
    """Make a module of a subclass that shares the original's attributes, so hooks and weights are its own.

    Its forward is `forward(stock, host, site, module, ...)`; in compiled code, and once restored, it is stock's.
    """
    replacement = object.__new__(_module_subclass(type(original), forward))
    object.__setattr__(replacement, "__dict__", original.__dict__)
    object.__setattr__(replacement, "_dit_accel_seat", Seat(original, host, site))
    return replacement


@functools.lru_cache(maxsize=64)
def _subclass(cls: type, attention: Callable[..., Any]) -> type:
    """Derive a processor's stand-in: one class for all layers and handles, because compiled code is guarded by it.

    The signature is kept because attention modules drop keyword arguments that a processor does not name.
    """

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat: Seat = self._dit_accel_seat
        if not seat.live:  # restored since, but kept by someone who had read the processors before
            return seat.original(*args, **kwargs)
        host = seat if torch.compiler.is_compiling() else seat.host
        return attention(seat.original, host, seat.site, *args, **kwargs)

    return _derived(cls, {"__call__": call})


@functools.lru_cache(maxsize=64)
def _module_subclass(cls: type, forward: Callable[..., Any]) -> type:
    """Derive a module's stand-in, as `_subclass` does a processor's."""
    stock: Callable[..., Any] = cls.forward

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._dit_accel_seat.live:
            return stock(self, *args, **kwargs)
        seat: Seat = self._dit_accel_seat
        return forward(stock, seat.host, seat.site, self, *args, **kwargs)

    return _derived(cls, {"forward": call})


def _derived(cls: type, members: dict[str, Any]) -> type:
    """Make a subclass of the same name with a seat; a copy or a pickle of its instances is one of the original."""
    common = {
        "__slots__": ("_dit_accel_seat",),  # beside the shared __dict__, not in it
        "__module__": cls.__module__,
        "__copy__": lambda self: copy.copy(self._dit_accel_seat.original),
        "__deepcopy__": lambda self, memo: copy.deepcopy(self._dit_accel_seat.original, memo),
        "__reduce_ex__": lambda self, protocol: (_itself, (self._dit_accel_seat.original,)),
    }
    return type(cls.__name__, (cls,), {**common, **members})


def _itself(original: Any) -> Any:
    return original
