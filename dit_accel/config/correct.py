"""Axis 5, correct: what stands for the pairs that were not computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Config


class CentroidCorrect(Config, frozen=True):
    """Each query also attends to the mean key and mean value of every unit that it skips, counted by its tokens."""

    kind: Literal["centroids"] = "centroids"


class MassCorrect(Config, frozen=True):
    """The output is scaled by the share of the pooled score that was computed, and the mean values of skipped units
    take the rest where that gains more than it costs.
    """

    kind: Literal["pooled-mass"] = "pooled-mass"


class DeltaCorrect(Config, frozen=True):
    """One query in `stride` is computed in full, and its neighbours move by the same difference."""

    kind: Literal["delta"] = "delta"
    stride: Annotated[int, Field(ge=2, le=1024)] = 64


class ResidualCorrect(Config, frozen=True):
    """One step in `every` is computed in full and says what the others miss.

    It keeps each query's share of attention that the plan computes, which grows by `growth` at each step after, and
    the rest of the output.
    """

    kind: Literal["residual"] = "residual"
    every: Annotated[int, Field(ge=2, le=1000)] = 5
    growth: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.04


Correct = Annotated[CentroidCorrect | MassCorrect | DeltaCorrect | ResidualCorrect, Field(discriminator="kind")]
