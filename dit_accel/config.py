"""Validated, frozen configuration: what a recipe is made of, and how one is read from a name, file or dict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import ConfigError, nearest


class Config(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Base of all settings: frozen, hashable, strict about types, unknown keys refused."""


Density = Annotated[float, Field(gt=0, le=1, strict=False)]
Side = Annotated[int, Field(ge=1, le=256)]
Tile = Annotated[tuple[Side, Side, Side], Field(strict=False)]
Block = Literal[16, 32, 64, 128]


# Axis 1: order -------------------------------------------------------------------------------------------------
class RasterOrder(Config, frozen=True):
    """Tokens stay as the model has them."""

    kind: Literal["raster"] = "raster"


class TileOrder(Config, frozen=True):
    """3-D tiles; `picture` is used on grids of one frame, `video` on the others, halved where a grid is small."""

    kind: Literal["tile"] = "tile"
    picture: Tile = (1, 8, 16)
    video: Tile = (4, 8, 8)


class HilbertOrder(Config, frozen=True):
    """Runs of a Hilbert curve."""

    kind: Literal["hilbert"] = "hilbert"


# Axis 2: score -------------------------------------------------------------------------------------------------
class GeometryScore(Config, frozen=True):
    """Nearness on the grid alone: `window` (all axes near) or `cross` (any axis near)."""

    kind: Literal["geometry"] = "geometry"
    shape: Literal["window", "cross"] = "window"


class PooledScore(Config, frozen=True):
    """Softmax of the product of mean queries and mean keys."""

    kind: Literal["pooled"] = "pooled"


# Axis 3: select ------------------------------------------------------------------------------------------------
class WithinSelect(Config, frozen=True):
    """All pairs no farther than `radius` units (geometry scores only)."""

    kind: Literal["within"] = "within"
    radius: Annotated[int, Field(ge=0, le=4096)] = 1


class TopKSelect(Config, frozen=True):
    """The best pairs of each row, as many as `density` allows."""

    kind: Literal["top-k"] = "top-k"
    density: Density = 0.3


class TopPSelect(Config, frozen=True):
    """The best pairs of each row until their share of the score reaches `p`."""

    kind: Literal["top-p"] = "top-p"
    p: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.9


class PercentileSelect(Config, frozen=True):
    """The best pairs of each head over all its rows, as many as `density` allows; no row stays empty."""

    kind: Literal["percentile"] = "percentile"
    density: Density = 0.3


class Keeps(Config, frozen=True):
    """Pairs that are always computed, besides text: own unit, the first `sinks` keys, and of videos some frames.

    Of videos: `first_frame` its keys, `own_frame` the keys of the query's frame, `own_place` the keys at the query's
    row and column in every frame. Units are kept whole, those that span several frames too. Pictures have no frames.
    """

    own: bool = True
    first_frame: bool = False
    own_frame: bool = False
    own_place: bool = False
    sinks: Annotated[int, Field(ge=0)] = 0


Order = Annotated[RasterOrder | TileOrder | HilbertOrder, Field(discriminator="kind")]
Score = Annotated[GeometryScore | PooledScore, Field(discriminator="kind")]
Select = Annotated[WithinSelect | TopKSelect | TopPSelect | PercentileSelect, Field(discriminator="kind")]
AXES = ("order", "score", "select", "keeps")


class Recipe(Config, frozen=True):
    """One sparse-attention method: a choice on each axis, and when it applies.

    `every`: sparse steps between two decisions. `dense_steps`: share of the first steps left dense.
    `dense_layers`: first layers left dense. `block_q`, `block_k`: largest kernel tile. `adaptive`: go dense where
    the measured table says that sparse would be slower (presets). `sources`: the papers.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    order: Order = RasterOrder()
    score: Score = GeometryScore()
    select: Select = TopKSelect()
    keeps: Keeps = Keeps()
    every: Annotated[int, Field(ge=1)] = 1
    dense_steps: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.2
    dense_layers: Annotated[int, Field(ge=0)] = 0
    block_q: Block = 128
    block_k: Block = 64
    adaptive: bool = False
    sources: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _axes_fit(self) -> Recipe:
        if self.select.kind == "within" and self.score.kind != "geometry":
            raise ValueError("select 'within' measures distance, so it needs score 'geometry'")
        if self.select.kind == "top-p" and self.score.kind == "geometry":
            raise ValueError("select 'top-p' adds up shares of a score, so it needs score 'pooled'")
        return self

    @property
    def density(self) -> float | None:
        """The asked density, None where the rule itself decides."""
        return getattr(self.select, "density", None)

    @property
    def content_driven(self) -> bool:
        """Whether the decision depends on the queries and keys."""
        return self.score.kind != "geometry"

    def override(self, **changes: Any) -> Recipe:
        """Return a copy with settings replaced, by field name or by the name of a field of the chosen axes.

        `density` also turns a fixed geometric rule into "the nearest pairs, as many as the density allows".
        Raises ConfigError on unknown names and impossible values.
        """
        data = self.model_dump()
        for key, value in changes.items():
            if key in data and key not in AXES:
                data[key] = value
            elif key in AXES:
                data[key] = value if not isinstance(value, Config) else value.model_dump()
            elif key == "density" and self.select.kind == "within":
                data["select"] = {"kind": "top-k", "density": value}
            else:
                owner = next((axis for axis in AXES if key != "kind" and key in data[axis]), None)
                if owner is None:
                    raise ConfigError(f"recipe {self.name!r}: unknown setting {key!r}.{nearest(key, self._settings())}")
                data[owner] = {**data[owner], key: value}
        return build(Recipe, data, f"recipe {self.name!r}")

    def _settings(self) -> list[str]:
        data = self.model_dump()
        inner = [key for axis in AXES for key in data[axis] if key != "kind"]
        return [*data, *inner, *(["density"] if self.select.kind == "within" else [])]

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={getattr(self, axis)!r}" for axis in AXES)
        when = f"every={self.every}, dense_steps={self.dense_steps:g}, dense_layers={self.dense_layers}"
        return f"{self.name}: {axes}, {when}"


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
        return f"{path[0]}.kind: no {path[0]} is called {item['ctx']['tag']!r}.{nearest(str(item['ctx']['tag']), tags)}"
    shown = repr(item["input"])
    return f"{'.'.join(path) or 'value'}: {item['msg'].lower()}, got {shown if len(shown) < 80 else shown[:77] + '...'}"


def _fields(cls: type[Config], path: list[str]) -> list[str]:
    """List the field names of the model that `path` leads to (union members are told apart by their kind)."""
    current: Any = cls
    for part in path:
        options = [current] if not get_args(current) else list(get_args(current))
        models = [o for o in options if isinstance(o, type) and issubclass(o, Config)]
        tagged = [m for m in models if m.model_fields.get("kind") and m.model_fields["kind"].default == part]
        if tagged:
            current = tagged[0]
        elif models and part in models[0].model_fields:
            current = models[0].model_fields[part].annotation
    return list(getattr(current, "model_fields", {}))


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping; raise ConfigError when it is missing, broken, too large or no mapping."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ConfigError(f"{path}: larger than 1 MiB, this is no recipe.")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: is no valid {path.suffix[1:].upper()} ({str(error).splitlines()[0]}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}.")
    return data


def write_file(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, or as JSON where the name ends so."""
    data = json.loads(recipe.model_dump_json())
    text = json.dumps(data, indent=2) if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")
