"""What a calibration found: a pattern or a floor for each head of one model, in a file that says what it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ..errors import ConfigError
from ..output import write_whole
from .base import Config, Count, Share
from .check import build
from .difference import first_difference
from .files import read_file
from .heads import HeadChoice
from .recipe import AXES, Recipe

FORMAT = 1

Windows = Annotated[tuple[Share, ...], Field(min_length=1, strict=False)]
Options = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)]
Floors = Annotated[tuple[Share, ...], Field(min_length=1, strict=False)]
OptionsOfSite = Annotated[tuple[Options | None, ...], Field(strict=False)]
FloorsOfSite = Annotated[tuple[Floors | None, ...], Field(strict=False)]


class Made(Config, frozen=True):
    """How a profile was made: package version, token layout, denoising steps, prompts, queries looked at in a call."""

    version: str
    layout: str
    steps: Count
    prompts: Annotated[tuple[str, ...], Field(strict=False)]
    rows: Count


class Profile(Config, frozen=True):
    """What each head of a model was found to need, for one recipe (docs/calibration.md).

    `models`: the transformer classes. `windows`: where each window of the run begins, as a share of it. By attention
    site and window, None where it was not seen: `options`, a number of the recipe's patterns for each head, one more
    than the last for everything; or `floors`, a share of the keys for each head, used within `clamp`.
    """

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    made: Made
    models: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    recipe: Recipe
    windows: Windows
    options: dict[str, OptionsOfSite] | None = None
    floors: dict[str, FloorsOfSite] | None = None
    clamp: Annotated[tuple[Share, Share], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Profile:
        if (self.options is None) == (self.floors is None):
            raise ValueError("a profile has either options or floors")
        if self.windows[0] != 0 or any(a >= b for a, b in pairwise(self.windows)):
            raise ValueError("windows begin at 0 and each after the one before")
        if self.recipe.cases or self.recipe.decide_layers:
            raise ValueError("a recipe with cases or decide_layers has no profile")
        if self.options is not None and self.choice is None:
            raise ValueError("options need a recipe with heads or search")
        if self.floors is not None and not getattr(self.recipe.select, "least", 0):
            raise ValueError("floors need a recipe whose select has a floor, least")
        if self.clamp is not None and (self.floors is None or self.clamp[0] > self.clamp[1]):
            raise ValueError("clamp is the smallest and the largest of the floors")
        for site, values in self.values.items():
            self._check_site(site, values)
        return self

    def _check_site(self, site: str, values: Sequence[Sequence[float] | None]) -> None:
        if len(values) != len(self.windows):
            raise ValueError(f"{site} has values for {len(values)} windows, but there are {len(self.windows)}")
        if len({len(heads) for heads in values if heads is not None}) > 1:
            raise ValueError(f"{site} has another number of heads in another window")
        if self.choice is not None and self.options is not None:
            most = max((max(heads) for heads in values if heads is not None), default=0)
            if most > (there := len(self.choice.options)):
                raise ValueError(f"{site} names option {int(most)}, but there are {there}, from 0 on")

    @property
    def choice(self) -> HeadChoice | None:
        """The patterns among which heads were given one."""
        return self.recipe.heads or self.recipe.search

    @property
    def values(self) -> Mapping[str, Sequence[Sequence[float] | None]]:
        """What was found, by site and window: one number a head."""
        return self.options if self.options is not None else self.floors or {}

    # -- what it fits ---------------------------------------------------------------------------------------------
    def check_model(self, models: Sequence[str], heads: Mapping[str, int | None], where: str = "profile") -> None:
        """Raise ConfigError unless the profile fits a model of these transformer classes and heads by site."""
        if tuple(models) != self.models:
            raise ConfigError(f"{where}: made for {' and '.join(self.models)}, this is {' and '.join(models)}.")
        if self.values.keys() != heads.keys():
            odd = next(name for name in [*heads, *self.values] if (name in heads) != (name in self.values))
            has = "here alone" if odd in heads else "there alone"
            raise ConfigError(
                f"{where}: made for a model of {len(self.values)} attention sites, this one has {len(heads)} "
                f"({odd} is {has})."
            )
        for site, windows in self.values.items():
            there = next((len(values) for values in windows if values is not None), None)
            if None not in (there, heads[site]) and there != heads[site]:
                raise ConfigError(f"{where}: {site} has {there} heads in the profile, {heads[site]} here.")

    def check_recipe(self, recipe: Recipe, where: str = "profile") -> None:
        """Raise ConfigError unless the axes of a recipe are those that the profile was made with."""
        unasked = ("order", "score", "select") if self.recipe.heads and recipe.heads else ()
        names = [name for name in ("heads", "search", *AXES, "cases", "decide_layers") if name not in unasked]
        if (found := first_difference(self.recipe, recipe, names)) is not None:
            path, there, here = found
            raise ConfigError(
                f"{where}: made with recipe {self.recipe.name!r}, where {path} is {there}; "
                f"in recipe {recipe.name!r} it is {here}."
            )

    # -- files ----------------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; ConfigError where it is missing, broken, of a newer format, or holds what it may not."""
        path = Path(path)
        data = read_file(path, mib=64)
        written = data.get("format")
        if not isinstance(written, int):
            raise ConfigError(f"{path}: is no calibration profile, it names no format.")
        if written > FORMAT:
            made = data.get("made")
            by = f" by dit_accel {made.get('version')}" if isinstance(made, Mapping) else ""
            raise ConfigError(f"{path}: written{by} in format {written}; this version reads up to {FORMAT}.")
        return build(cls, data, str(path))

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the profile as JSON, whole or not at all; ConfigError where, without `force`, a file is there."""
        write_whole(self.text().encode(), check_name(Path(path)), force)

    def text(self) -> str:
        """Return the profile as JSON, with a line for each site."""
        data = self.model_dump(mode="json")
        parts = [f"{json.dumps(key)}: {_written(value)}" for key, value in data.items() if value is not None]
        return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def check_name(path: Path) -> Path:
    """Return where a profile is to lie; ConfigError where the name says that it is something else."""
    if path.suffix.lower() != ".json":
        raise ConfigError(f"output {path}: a profile is a .json file.")
    return path


def _written(value: Any) -> str:
    if not isinstance(value, Mapping):
        return json.dumps(value)
    lines = [f"    {json.dumps(key)}: {json.dumps(its, ensure_ascii=False)}" for key, its in value.items()]
    return "{\n" + ",\n".join(lines) + "\n  }"
