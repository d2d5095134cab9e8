"""Validation with errors that name the field, what it takes and the nearest spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from ..errors import ConfigError, nearest
from .base import Config


def build(cls: type[Config], data: Any, where: str) -> Any:
    """Validate `data` into `cls`; raise ConfigError that names the field, what it takes and the nearest spelling."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(data).__name__}.")
    try:
        return cls.model_validate(_tuples(dict(data)))
    except ValidationError as error:
        lines = [_explain(cls, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, which is what strict validation of JSON and YAML input wants."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _explain(cls: type[Config], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"unknown setting {'.'.join(path)!r}.{nearest(path[-1], _fields(cls, path[:-1]))}"
    if item["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in str(item["ctx"]["expected_tags"]).split(",")]
        named = next((part for part in reversed(path) if part.isidentifier()), "value")
        given = str(item["ctx"]["tag"])
        return f"{'.'.join(path)}.kind: no {named} is called {given!r}.{nearest(given, tags)}"
    shown = repr(item["input"])
    got = f"got {shown if len(shown) < 80 else shown[:77] + '...'}"
    where = ".".join(path) or "value"
    if item["type"] in ("union_tag_not_found", "model_attributes_type"):
        kinds = sorted(m.model_fields["kind"].default for m in _reached(cls, path) if "kind" in m.model_fields)
        return f"{where}: expected {{kind: ...}}, one of {', '.join(kinds)}, {got}.{_meant(item['input'], kinds)}"
    if item["type"] == "model_type":
        return f"{where}: expected a mapping of settings, {got}"
    return f"{where}: {item['msg'].lower()}, {got}"


def _meant(given: Any, kinds: list[str]) -> str:
    """Name the kind that a bare word, or one under a misspelled key, is nearest to."""
    words = given.values() if isinstance(given, Mapping) else [given]
    near = (get_close_matches(word, kinds, n=1) for word in words if isinstance(word, str))
    found = next(filter(None, near), None)
    return f" Did you mean {{kind: {found[0]}}}?" if found else ""


def _fields(cls: type[Config], path: list[str]) -> list[str]:
    """List the field names of what `path` leads to."""
    return sorted({name for model in _reached(cls, path) for name in model.model_fields})


def _reached(cls: type[Config], path: list[str]) -> list[type[Config]]:
    """List the models that `path` leads to (union members are told apart by their kind)."""
    current = [cls]
    for part in path:
        tagged = [m for m in current if (kind := m.model_fields.get("kind")) and kind.default == part]
        inner = [m for model in current if part in model.model_fields for m in _models(model, part)]
        current = tagged or inner or current  # a position in a tuple leads nowhere new
    return current


def _models(model: type[Config], field: str) -> list[type[Config]]:
    """List the settings classes that a field may hold, however deep its annotation nests them."""

    def walk(annotation: Any) -> Iterator[type[Config]]:
        if isinstance(annotation, type) and issubclass(annotation, Config):
            yield annotation
        for part in get_args(annotation):
            yield from walk(part)

    return list(walk(model.model_fields[field].annotation))
