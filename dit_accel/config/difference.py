"""In which setting two recipes differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .base import Config


def first_difference(there: Config, here: Config, names: Iterable[str]) -> tuple[str, Any, Any] | None:
    """Return the first setting, of those named and within them, in which two differ, and what it is in both."""
    found = (_difference(name, _plain(getattr(there, name)), _plain(getattr(here, name))) for name in names)
    return next((one for one in found if one is not None), None)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Config) else value


def _difference(path: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there.get("kind") == here.get("kind"):
        pairs = [(key, there.get(key), here.get(key)) for key in {**there, **here}]
    elif isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return None if there == here else (path, _short(there), _short(here))
    found = (_difference(f"{path}.{key}", a, b) for key, a, b in pairs)
    return next((one for one in found if one is not None), None)


def _short(value: Any) -> Any:
    if value is None or isinstance(value, Mapping):
        return value.get("kind", "set") if value else "not set"
    long = isinstance(value, tuple) and (len(value) > 4 or any(isinstance(part, Mapping) for part in value))
    return f"{len(value)} long" if long else value
