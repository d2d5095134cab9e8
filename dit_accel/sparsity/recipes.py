"""The recipe table: each paper's method as a choice on the axes, with its own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import (
    GeometryScore,
    PercentileSelect,
    PooledScore,
    Recipe,
    TileOrder,
    TopKSelect,
    WithinSelect,
    build,
    read_file,
)
from ..errors import ConfigError, nearest

GRAT = "GRAT: Grouping First, Attending Smartly, Ren et al. 2025, arXiv 2505.14687"
DRAFT = "DraftAttention, Shen et al. 2025, arXiv 2505.14708"
GRAT_TILES = TileOrder(picture=(1, 16, 16), video=(4, 8, 8))
DRAFT_TILES = TileOrder(picture=(1, 8, 16), video=(1, 8, 16))

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="grat-b",
            order=GRAT_TILES,
            score=GeometryScore(shape="window"),
            select=WithinSelect(radius=1),
            sources=(GRAT,),
        ),
        Recipe(
            name="grat-x",
            order=GRAT_TILES,
            score=GeometryScore(shape="cross"),
            select=WithinSelect(radius=0),
            sources=(GRAT,),
        ),
        Recipe(
            name="draft",
            order=DRAFT_TILES,
            score=PooledScore(),
            select=PercentileSelect(density=0.25),
            sources=(DRAFT,),
        ),
    )
}

_PRESET = {"order": DRAFT_TILES, "score": PooledScore(), "adaptive": True, "sources": (DRAFT,)}
PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="quality", select=TopKSelect(density=0.5), dense_steps=0.25, **_PRESET),
        Recipe(name="balanced", select=TopKSelect(density=0.3), dense_steps=0.2, **_PRESET),
        Recipe(name="fast", select=TopKSelect(density=0.2), dense_steps=0.15, every=2, **_PRESET),
    )
}
ALIASES = {"grat": "grat-x"}


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
