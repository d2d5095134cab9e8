"""From a name, file, mapping or Recipe to a validated Recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Mixtures, Recipe, build, read_file
from ..errors import ConfigError, nearest
from .mixtures import auto
from .table import PRESETS, RECIPES

ALIASES = {"grat": "grat-x", "svg": "svg2", "vdit": "sparse-vdit"}


def resolve(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> Recipe:
    """Turn a name, a YAML/JSON file, a mapping or a Recipe, plus overrides, into a validated Recipe.

    A mapping or file may name a `base` recipe and then only the settings that differ, or hold mixtures, of which the
    one for the density is taken. A density of None asks for none. A density asked for is carried out: it takes a preset
    its right to go dense. Raises ConfigError.
    """
    changes = {key: value for key, value in overrides.items() if key != "density" or value is not None}
    found = _single(_base(recipe), changes)
    if not changes:
        return found
    if "density" in changes:
        changes.setdefault("adaptive", False)
    return found.override(**changes)


def _base(recipe: Any, inside: tuple[Path, ...] = ()) -> Recipe | Mixtures:
    """Return what a name, file, mapping or Recipe stands for; `inside` are the files that name it as their base."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml", ".json"))):
        file = Path(recipe).resolve()
        if file in inside:
            raise ConfigError(f"{recipe}: is its own base.")
        return _from_mapping(read_file(Path(recipe)), str(recipe), (*inside, file))
    if isinstance(recipe, Mapping):
        return _from_mapping(dict(recipe), "recipe", inside)
    if not isinstance(recipe, str):
        raise ConfigError(f"recipe: expected a name, a file, a mapping or a Recipe, got {type(recipe).__name__}.")
    known = {**RECIPES, **PRESETS}
    name = ALIASES.get(recipe, recipe)
    if name == auto().name:
        return auto()
    if name not in known:
        raise ConfigError(f"recipe: no recipe is called {recipe!r}.{nearest(recipe, [*known, *ALIASES])}")
    return known[name]


def _single(found: Recipe | Mixtures, changes: dict[str, Any]) -> Recipe:
    """Take from mixtures the one for the asked density, which is then no change any more."""
    return found if isinstance(found, Recipe) else found.at(changes.pop("density", None))


def _from_mapping(data: dict[Any, Any], where: str, inside: tuple[Path, ...]) -> Recipe | Mixtures:
    for key in data:
        if not isinstance(key, str):
            bare = " (YAML reads a bare on, off, yes or no as true or false)" if isinstance(key, bool) else ""
            raise ConfigError(f"{where}: settings are named by words, got {key!r}{bare}.")
    base = data.pop("base", None)
    if base is not None:
        return _single(_base(base, inside), data).override(**data)
    return build(Mixtures if "recipes" in data else Recipe, data, where)
