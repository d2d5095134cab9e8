"""Heads that choose among several patterns, each by what it would lose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config, Count, Density
from .order import Order, RasterOrder
from .score import GeometryScore, Score
from .select import Select


class Option(Config, frozen=True):
    """One pattern a head may take: an order, a score and a selection of its own."""

    order: Order = RasterOrder()
    score: Score = GeometryScore()
    select: Select


class HeadChoice(Config, frozen=True):
    """Each head takes the option that loses least on `rows` sampled exact queries, spread over the grid.

    `loss`: "output" is the mean squared error of the output, over the mean square of the exact one; "mass" the
    attention left out. `price`: added per computed share of pairs. `limit`: a head whose every option loses more
    is computed in full. `budget`: the price is instead the one at which the heads of a sample together compute that
    share of their pairs. `given`: the option of each head, by number, instead of any measuring; one more than the last
    computes everything. `trust`: no loss is measured; heads whose pooled score lies nearer to exact attention than this
    (square root of the Jensen-Shannon divergence, on units of `rows` queries in all) take the first of two options, the
    others the second.
    """

    options: Annotated[tuple[Option, ...], Field(min_length=1, max_length=32, strict=False)]
    rows: Count = 64
    loss: Literal["output", "mass"] = "output"
    price: Annotated[float, Field(ge=0, strict=False)] = 0.0
    limit: Annotated[float, Field(gt=0, strict=False)] | None = None
    budget: Density | None = None
    given: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = ()
    trust: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None

    @model_validator(mode="after")
    def _numbers_fit(self) -> HeadChoice:
        if self.given and max(self.given) > len(self.options):
            raise ValueError(f"given names option {max(self.given)}, but there are {len(self.options)}, from 0 on")
        orders = {option.order for option in self.options}
        if len(orders) > 1 and any(order.kind == "tile" for order in orders):
            raise ValueError("options of heads that lie in tiles must all lie in the same tiles")
        if self.trust is not None and (len(self.options) != 2 or self.options[0].score.kind != "pooled"):
            raise ValueError("trust chooses between two options, the first with score 'pooled', which is what it tests")
        if self.trust is not None and (self.budget is not None or self.limit is not None or self.price):
            raise ValueError("trust chooses by no loss, so price, limit and budget must be left out")
        return self

    @property
    def whole(self) -> frozenset[int]:
        """The numbers that stand for computing everything."""
        return frozenset(i for i, option in enumerate(self.options) if option.select.kind == "all") | {
            len(self.options)
        }

    @property
    def full(self) -> bool:
        """Whether every head is told to compute everything."""
        return bool(self.given) and self.whole.issuperset(self.given)
