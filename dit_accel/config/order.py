"""Axis 1, order: which tokens share a block."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Config, Count, Tile

Axes = Literal["fhw", "fwh", "hfw", "hwf", "wfh", "whf"]
KeyRun = Literal[0, 16, 32, 64]


class RasterOrder(Config, frozen=True):
    """Tokens stay as the model has them."""

    kind: Literal["raster"] = "raster"


class AxesOrder(Config, frozen=True):
    """Tokens by one of the six orders of (frame, height, width), the first letter slowest.

    `whole`: runs end with each slice of the slowest axis, so that no unit mixes two of them.
    """

    kind: Literal["axes"] = "axes"
    axes: Axes = "fhw"
    whole: bool = False


class TileOrder(Config, frozen=True):
    """3-D tiles; `picture` is used on grids of one frame, `video` on the others, halved where a grid is small.

    `packed`: what the tiles leave over at a border is cut into tiles of its own shape, fewer and fuller ones. Tiles lie
    on no lattice then, so rules that count tiles along the axes can't have it.
    """

    kind: Literal["tile"] = "tile"
    picture: Tile = (1, 8, 16)
    video: Tile = (4, 8, 8)
    packed: bool = False


class HilbertOrder(Config, frozen=True):
    """Runs of a Hilbert curve.

    `key_run`: keys are chosen in shorter runs of so many tokens, both halved where a grid is small; 0: in runs as long
    as those of the queries.
    """

    kind: Literal["hilbert"] = "hilbert"
    key_run: KeyRun = 0


class GilbertOrder(Config, frozen=True):
    """Runs of a generalised Hilbert curve, which fits any box without gaps; `key_run` as there."""

    kind: Literal["gilbert"] = "gilbert"
    key_run: KeyRun = 0


class ImportanceOrder(Config, frozen=True):
    """Keys by the attention that sampled queries give them, best first; queries follow a Gilbert curve.

    `rows` sampled queries, spread over the grid. `segment`: keys are sorted inside runs of so many tokens of the
    curve, 0 for the whole grid.
    """

    kind: Literal["importance"] = "importance"
    rows: Count = 64
    segment: Annotated[int, Field(ge=0)] = 0


class KMeansOrder(Config, frozen=True):
    """Queries and keys each in k-means clusters, one cluster a unit.

    `queries`, `keys`: clusters, fewer on small grids. `first`, `later`: iterations of the first decision of a run
    and of those that start from the last centroids. `joint`: co-clustering, which tells tokens apart by the direction
    of their products with the other side's centroids.
    """

    kind: Literal["kmeans"] = "kmeans"
    queries: Count = 300
    keys: Count = 1000
    first: Count = 50
    later: Count = 2
    joint: bool = False


StaticOrder = RasterOrder | AxesOrder | TileOrder | HilbertOrder | GilbertOrder
Order = Annotated[StaticOrder | ImportanceOrder | KMeansOrder, Field(discriminator="kind")]
