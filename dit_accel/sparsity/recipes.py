"""From a name, file, mapping or Recipe to a validated Recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Recipe, build, read_file
from ..errors import ConfigError, nearest
from .table import PRESETS, RECIPES

ALIASES = {"grat": "grat-x", "svg": "svg2", "vdit": "sparse-vdit"}


def resolve(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """Turn a name, a YAML/JSON file, a mapping or a Recipe, plus overrides, into a validated Recipe.

    A mapping or file may name a `base` recipe and then only the settings that differ. Overrides of None are
    left out. A density asked for is carried out: it takes a preset its right to go dense. Raises ConfigError.
    """
    changes = {key: value for key, value in overrides.items() if value is not None}
    if not changes:
        return _base(recipe)
    if "density" in changes:
        changes.setdefault("adaptive", False)
    return _base(recipe).override(**changes)


def _base(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml", ".json"))):
        return _from_mapping(read_file(Path(recipe)), str(recipe))
    if isinstance(recipe, Mapping):
        return _from_mapping(dict(recipe), "recipe")
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe: expected a name, a file, a mapping or a Recipe, got {type(recipe).__name__}.")
    known = {**RECIPES, **PRESETS}
    name = ALIASES.get(recipe, recipe)
    if name not in known:
        raise ConfigError(f"recipe: no recipe is called {recipe!r}.{nearest(recipe, [*known, *ALIASES])}")
    return known[name]


def _from_mapping(data: dict[str, Any], where: str) -> Recipe:
    base = data.pop("base", None)
    if base is None:
        return build(Recipe, data, where)
    return _base(base).override(**data)
