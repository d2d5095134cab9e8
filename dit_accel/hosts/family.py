"""What the engine must know of a diffusers family: its attention sites and where a call's geometry stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from ..call import Site
from ..engine import Engine
from ..layout import TokenLayout
from ..origin import Origin
from ..step import StepInfo


class LayoutUnknownError(Exception):
    """The geometry of a call cannot be had; the message says why."""


class Host(Protocol):
    """What a host's attention function may ask of the transformer it sits in: an `Attachment`.

    In traced code it is a `Seat`, which knows nothing that may change between steps (docs/compile.md).

    `prompt` is what the call's text keys and values are computed from, where the family has cross-attentions.
    """

    engine: Engine
    step: StepInfo
    layout: TokenLayout | None
    prompt: Origin | None

    def dense_reason(self, site: Site, x: torch.Tensor, length: int | None = None) -> str: ...


Geometry = Callable[[torch.nn.Module, Mapping[str, Any], dict[str, Any]], TokenLayout]


@dataclass(frozen=True)
class CrossAttention:
    """The cross-attentions of a family: always dense, not among its sites, their text keys and values kept.

    `sites`: a pattern of module paths. `prompt(transformer, arguments)` names what the text is computed from.
    """

    sites: str
    attention: Callable[..., Any]
    prompt: Callable[[torch.nn.Module, Mapping[str, Any]], Origin]


@dataclass(frozen=True)
class Family:
    """One diffusers family.

    `classes`: transformer class names. `sites`: a pattern of module paths whose first group names the layer group.
    `geometry(transformer, arguments, memo)` reads the layout from the arguments of the transformer's forward, with
    a dict that lives as long as the attachment, and raises LayoutUnknownError. `processors`: processor classes this
    family computes itself through `attention`; all others are intercepted. `answer` carries out what `attention` has
    become in compiled code: `own.answer` with the family's rotation, or alike.
    """

    name: str
    classes: tuple[str, ...]
    sites: str
    geometry: Geometry
    processors: tuple[str, ...] = ()
    attention: Callable[..., Any] | None = None
    answer: Callable[..., torch.Tensor] | None = None
    cross: CrossAttention | None = None

    def find_sites(self, transformer: torch.nn.Module) -> list[Site]:
        """List the attention modules the recipe may speak for, in the order the model runs them."""
        return _matching(transformer, self.sites)

    def find_cross_sites(self, transformer: torch.nn.Module) -> list[Site]:
        """List the cross-attentions whose processors are known."""
        found = _matching(transformer, self.cross.sites) if self.cross else []
        return [site for site in found if self.knows(site.module.processor)]

    def knows(self, processor: Any) -> bool:
        """Say whether a processor is one that this family computes itself, and not a user's own of the same name."""
        cls = type(processor)
        return cls.__name__ in self.processors and cls.__module__.startswith("diffusers.")


def _matching(transformer: torch.nn.Module, sites: str) -> list[Site]:
    pattern, found = re.compile(sites), []
    for name, module in transformer.named_modules():
        match = pattern.fullmatch(name)
        if match and hasattr(module, "processor"):
            found.append(Site(name, match.group(1), len(found), module))
    return found


def bind(transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the forward arguments by name."""
    names = _parameters(type(transformer))
    return {**dict(zip(names, args, strict=False)), **kwargs}


@lru_cache(maxsize=64)
def _parameters(cls: type[torch.nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]
