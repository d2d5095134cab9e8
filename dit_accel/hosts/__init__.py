"""Which family a transformer belongs to."""

from __future__ import annotations

import torch

from .cogvideox import COGVIDEOX
from .families import FAMILIES
from .family import Family, LayoutUnknownError
from .flux import FLUX
from .hunyuan_video import HUNYUAN_VIDEO
from .wan import WAN

__all__ = ["Family", "LayoutUnknownError", "all_families", "family_of"]


def all_families() -> tuple[Family, ...]:
    """Every family the engine knows."""
    return (FLUX, WAN, HUNYUAN_VIDEO, COGVIDEOX, *FAMILIES)


def family_of(transformer: torch.nn.Module) -> Family | None:
    """Return the family of a transformer by its class or a parent class, None when it is not known."""
    names = [cls.__name__ for cls in type(transformer).__mro__]
    return next((family for family in all_families() if set(family.classes) & set(names)), None)
