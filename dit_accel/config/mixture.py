"""Mixtures of recipes, one for each density, and what they were chosen from."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, model_validator

from .base import Config
from .recipe import Recipe, asked_density

USUAL = 0.3  # the density of a mixture that is asked for none


class Choice(Config, frozen=True):
    """What a mixture was chosen from: the model, how it was run, by which prompts, and who could be chosen.

    `best`: the single recipes that were best there, one for each density.
    """

    model: str
    described: str
    prompts: Annotated[tuple[str, ...], Field(strict=False)]
    candidates: Annotated[tuple[str, ...], Field(strict=False)]
    best: Annotated[tuple[str, ...], Field(strict=False)] = ()


class Mixtures(Config, frozen=True):
    """Mixtures of one name, each for the density that is its `total`, and what they were chosen from."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    chosen: Choice
    recipes: Annotated[tuple[Recipe, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _every_one_has_a_total(self) -> Mixtures:
        totals = [recipe.total for recipe in self.recipes]
        if None in totals or len(set(totals)) < len(totals):
            raise ValueError("each recipe of a mixture needs a total, another one than the others'")
        return self

    def at(self, density: Any = None) -> Recipe:
        """Return the mixture made for a density, or the nearest one, asked for more or less. Raises ConfigError."""
        wanted = USUAL if density is None else asked_density(density, f"recipe {self.name!r}")
        made = min(self.recipes, key=lambda recipe: abs(math.log((recipe.total or 1.0) / wanted)))
        return made if density is None or made.total == wanted else made.override(density=wanted)
