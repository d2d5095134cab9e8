"""The mixture that ships, `auto`: recipes by depth and step as `dit-accel choose` has found them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..config import Mixtures, build, read_file

FILE = Path(__file__).with_name("auto.json")


@lru_cache(maxsize=1)
def auto() -> Mixtures:
    """Return the shipped mixtures, one for each density they were chosen for."""
    return build(Mixtures, read_file(FILE), FILE.name)
