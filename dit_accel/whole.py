"""Whole numbers as a user may hand them over: Python's, or numpy's and torch's that stand for one."""

from __future__ import annotations

import operator
from typing import Any

from .errors import ConfigError


def whole(value: Any, where: str) -> int:
    """Return a whole number as Python's; raise ConfigError for what is none, 1.0 and True included."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{where}: expected a whole number, got {value!r}.") from None


def three_whole(value: Any, where: str, names: str) -> tuple[int, int, int]:
    """Return three whole numbers, such as a size or a place on a grid; raise ConfigError that tells their `names`."""
    try:
        first, second, third = (whole(part, where) for part in value)
    except (TypeError, ValueError):  # ConfigError is a ValueError
        raise ConfigError(f"{where}: expected {names} as three whole numbers, got {value!r}.") from None
    return first, second, third
