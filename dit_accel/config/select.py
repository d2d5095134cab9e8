"""Axis 3, select: which pairs are computed, given their scores or by their place alone."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from .base import Config, Density, Share, ShareOfHead, Tile


class Rule(Config, frozen=True):
    """A selection rule; `geometric` ones look at places alone and need no score."""

    geometric: ClassVar[bool] = False

    @property
    def asked(self) -> float | None:
        """The asked density, None where the rule itself decides."""
        return getattr(self, "density", None)

    def with_density(self, density: Any) -> dict[str, Any]:
        """Return the settings of the same rule for an asked density."""
        return {**self.model_dump(), "density": density}


# Rules over scores ---------------------------------------------------------------------------------------------
class WithinSelect(Rule, frozen=True):
    """All pairs no farther than `radius` units (geometry scores only)."""

    kind: Literal["within"] = "within"
    radius: Annotated[int, Field(ge=0, le=4096)] = 1

    def with_density(self, density: Any) -> dict[str, Any]:
        """Return "the nearest pairs, as many as the density allows"."""
        return {"kind": "top-k", "density": density}


class TopKSelect(Rule, frozen=True):
    """The best pairs of each row, as many as `density` allows.

    `spread`: heads whose best pairs hold more than 0.8 of the score get fewer, as many of the others get more.
    """

    kind: Literal["top-k"] = "top-k"
    density: Density = 0.3
    spread: bool = False


class TopPSelect(Rule, frozen=True):
    """The best pairs of each row until their share of the score reaches `p`, and at least `least` of the columns.

    `least` may be a list with a number for each head, as a calibration finds them. With a `density`, each head finds
    its own p: the one at which its rows together take that many pairs.
    """

    kind: Literal["top-p"] = "top-p"
    p: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.9
    least: ShareOfHead = 0.0
    density: Density | None = None


class PercentileSelect(Rule, frozen=True):
    """The best pairs of each head over all its rows, as many as `density` allows; no row stays empty."""

    kind: Literal["percentile"] = "percentile"
    density: Density = 0.3


class CumulativeSelect(Rule, frozen=True):
    """The best pairs of each head over all its rows until their share of the score reaches `p`.

    `rescale`: scores are first moved to 0..1 within each row, as bare products need.
    """

    kind: Literal["cumulative"] = "cumulative"
    p: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.9
    rescale: bool = False

    def with_density(self, density: Any) -> dict[str, Any]:
        """Return the percentile rule: the same ranking, cut by density."""
        return {"kind": "percentile", "density": density}


class ThresholdSelect(Rule, frozen=True):
    """The pairs of units in which any query may give any key more than `above` of its attention (score 'low-bit').

    With a density the best pairs of each row instead: what a share is held against differs from query to query.
    """

    kind: Literal["threshold"] = "threshold"
    above: Annotated[float, Field(gt=0, lt=1, strict=False)] = 0.008

    def with_density(self, density: Any) -> dict[str, Any]:
        """Return the rule of the best pairs of each row, as many as the density allows."""
        return {"kind": "top-k", "density": density}


class ErrorSelect(Rule, frozen=True):
    """As many key tokens of each row as top-p would take, those first whose means would err most per token.

    `p`, `least` as in top-p. With a `density` instead, the pairs of most error per token of each head, after a share
    `least` of each row, half the density at most. Goes with the correction 'centroids', whose error it looks at.
    """

    kind: Literal["error"] = "error"
    p: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.9
    least: ShareOfHead = 0.0
    density: Density | None = None


class LinesSelect(Rule, frozen=True):
    """The key tiles and the displacements on the grid that sampled rows attend to most, as many as `density` allows.

    `columns`: the part of that which goes to key tiles that all queries see. With a `p` instead, the fewest key tiles
    and the fewest displacements that each hold that share of the rows' attention. Needs tiles and score 'sampled'.
    """

    kind: Literal["lines"] = "lines"
    columns: Share = 0.2
    density: Density = 0.1
    p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None

    @property
    def asked(self) -> float | None:
        return None if self.p else self.density

    def with_density(self, density: Any) -> dict[str, Any]:
        return {**self.model_dump(), "p": None, "density": density}


Along = Literal["", "f", "h", "w", "fh", "fw", "hw"]


# Rules over places ---------------------------------------------------------------------------------------------
class NeighborhoodSelect(Rule, frozen=True):
    """A window of `kernel` tokens around each query, moved inside the grid at its borders.

    Queries in a group of `stride` share one window, None for the tile. `dilation` leaves gaps. Without a `kernel`
    the window is the same share of every axis, as large as `density` allows; `along` names axes that it spans whole, so
    that the others hold the density. `per`: "token" is exact, "tile" moves whole tiles (kernel counted in tiles).
    """

    geometric: ClassVar[bool] = True
    kind: Literal["neighborhood"] = "neighborhood"
    kernel: Tile | None = None
    stride: Tile | None = None
    dilation: Tile = (1, 1, 1)
    along: Along = ""
    per: Literal["token", "tile"] = "token"
    density: Density = 0.3

    @model_validator(mode="after")
    def _numbers_fit(self) -> NeighborhoodSelect:
        if self.kernel and self.along:
            raise ValueError("kernel fixes the window on every axis, so along must be empty")
        return self

    @property
    def asked(self) -> float | None:
        return None if self.kernel else self.density

    def with_density(self, density: Any) -> dict[str, Any]:
        return {**self.model_dump(), "kernel": None, "density": density}


class DiskSelect(Rule, frozen=True):
    """All tokens nearer than `radius` in the frame and at most `frames` away in time.

    Without a `radius` the disk is as large as `density` allows.
    """

    geometric: ClassVar[bool] = True
    kind: Literal["disk"] = "disk"
    radius: Annotated[float, Field(gt=0, le=4096, strict=False)] | None = None
    frames: Annotated[int, Field(ge=0, le=4096)] = 0
    density: Density = 0.3

    @property
    def asked(self) -> float | None:
        return None if self.radius else self.density

    def with_density(self, density: Any) -> dict[str, Any]:
        return {**self.model_dump(), "radius": None, "density": density}


class RadialSelect(Rule, frozen=True):
    """A band in each pair of frames, half as wide at each doubling of their distance, then only some frame pairs.

    `decay` scales the band's width. With a `density` the decay is the one that gives it.
    """

    geometric: ClassVar[bool] = True
    kind: Literal["radial"] = "radial"
    decay: Annotated[float, Field(gt=0, le=16, strict=False)] = 0.95
    density: Density | None = None


class BandSelect(Rule, frozen=True):
    """A band around the diagonal of the order, as wide as `density` allows."""

    geometric: ClassVar[bool] = True
    kind: Literal["band"] = "band"
    density: Density = 0.3


class ColumnSelect(Rule, frozen=True):
    """The same key units for all queries: evenly spaced ones, as many as `density` allows."""

    geometric: ClassVar[bool] = True
    kind: Literal["columns"] = "columns"
    density: Density = 0.3


class AllSelect(Rule, frozen=True):
    """Every pair."""

    geometric: ClassVar[bool] = True
    kind: Literal["all"] = "all"


class NoneSelect(Rule, frozen=True):
    """No pair: the head's output is zero (an option of `heads` only)."""

    geometric: ClassVar[bool] = True
    kind: Literal["none"] = "none"


# Operators: no choice of pairs at all ---------------------------------------------------------------------------------
class AgentSelect(Rule, frozen=True):
    """Queries reach keys through agents, the mean queries of the cells of a coarse grid; text is exact.

    As many agents as cost `density`: a pair is a query and an agent, or an agent and a key. The queries' softmax over
    agents is scaled by scale ** `power`, and `value` of each query's own value is added. It has no mask of pairs.
    """

    geometric: ClassVar[bool] = True
    kind: Literal["agents"] = "agents"
    power: Annotated[float, Field(ge=0, le=2, strict=False)] = 0.3
    value: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.075
    density: Density = 0.125


Select = Annotated[
    WithinSelect
    | TopKSelect
    | TopPSelect
    | PercentileSelect
    | CumulativeSelect
    | ThresholdSelect
    | ErrorSelect
    | LinesSelect
    | NeighborhoodSelect
    | DiskSelect
    | RadialSelect
    | BandSelect
    | ColumnSelect
    | AllSelect
    | NoneSelect
    | AgentSelect,
    Field(discriminator="kind"),
]


class Keeps(Config, frozen=True):
    """Pairs that are always computed, besides text: own unit, the first `sinks` keys, and of videos some frames.

    Own unit where queries and keys lie in one order. Of videos: `first_frame` its keys, `own_frame` the keys of the
    query's frame, `own_place` the keys at the query's row and column in every frame. `adjacent`: all units that touch
    one's own on the grid. Units are kept whole, those that span several frames too. Pictures have no frames.
    """

    own: bool = True
    first_frame: bool = False
    own_frame: bool = False
    own_place: bool = False
    sinks: Annotated[int, Field(ge=0)] = 0
    adjacent: bool = False

    @property
    def by_place(self) -> bool:
        """Whether something is kept for its place on the grid, which moved keys have lost."""
        return bool(self.first_frame or self.own_frame or self.own_place or self.sinks or self.adjacent)
