"""Axis 2, score: what a (query unit, key unit) pair is worth."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Config, Count


class GeometryScore(Config, frozen=True):
    """Nearness on the grid alone: `window` (all axes near) or `cross` (any axis near)."""

    kind: Literal["geometry"] = "geometry"
    shape: Literal["window", "cross"] = "window"


class PooledScore(Config, frozen=True):
    """Softmax of the product of mean queries and mean keys.

    `weigh`: a key unit counts by its tokens. `smooth`: the mean key is taken off all keys first (it changes no
    softmax). `trust`: units whose tokens are less alike than this mean cosine are computed in full, None trusts all.
    `softmax`: off gives the bare products without scale.
    """

    kind: Literal["pooled"] = "pooled"
    weigh: bool = False
    smooth: bool = False
    trust: Annotated[float, Field(ge=-1, le=1, strict=False)] | None = None
    softmax: bool = True


class SubtileScore(Config, frozen=True):
    """Softmax of the products of means over `tokens` neighbours, summed to units."""

    kind: Literal["subtiles"] = "subtiles"
    tokens: Literal[4, 8, 16, 32] = 16


class AntidiagonalScore(Config, frozen=True):
    """Softmax of sums along the antidiagonals of `stride` x `stride` squares, summed to units."""

    kind: Literal["antidiagonal"] = "antidiagonal"
    stride: Literal[4, 8, 16, 32] = 16


class MassScore(Config, frozen=True):
    """The exact share of each query unit's attention that a key unit gets: full attention, so decide rarely.

    `cached`: later decisions of a run divide by the first one's log-sum-exps, which spares them a pass over the keys.
    """

    kind: Literal["mass"] = "mass"
    cached: bool = False


class SampledScore(Config, frozen=True):
    """The attention that `rows` sampled queries give a key unit: the same for all query units."""

    kind: Literal["sampled"] = "sampled"
    rows: Count = 64


class ChannelScore(Config, frozen=True):
    """The largest product of a unit pair over the `share` of channels that weigh most, as a softmax over key units.

    Every query meets every key, on few channels: decide rarely.
    """

    kind: Literal["channels"] = "channels"
    share: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.25


class LowBitScore(Config, frozen=True):
    """The logarithm of the largest attention that any key of a unit gets from any query of a unit, in few bits.

    Queries and keys are rounded to `bits`; what they are divided by is exact, over the pairs that are kept anyway (text
    and keeps), so that a weak choice of those keeps more. Every query meets every key: decide rarely.
    """

    kind: Literal["low-bit"] = "low-bit"
    bits: Literal[4, 8] = 4


class TreeScore(Config, frozen=True):
    """The largest product met on a binary descent through a key unit: its halves are judged by their middle keys.

    `queries`: so many neighbours ask as one, by their mean.
    """

    kind: Literal["tree"] = "tree"
    queries: Literal[1, 2, 4, 8, 16] = 4


Score = Annotated[
    GeometryScore
    | PooledScore
    | SubtileScore
    | AntidiagonalScore
    | MassScore
    | SampledScore
    | ChannelScore
    | LowBitScore
    | TreeScore,
    Field(discriminator="kind"),
]
