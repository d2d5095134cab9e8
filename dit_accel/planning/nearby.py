"""Sizes near the asked one at which tiles fill up: fewer holes for our kernel to compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Recipe, TileOrder
from ..layout import Grid
from ..sparsity import orders
from ..sparsity.orders import Shape, fit_tile

REACH, MOST = 0.15, 8  # how far a side may go, as a share and in tokens; the share is that of all tokens, too
LESS = 0.02  # of the slots a token, or a size is no better


@dataclass(frozen=True)
class Fit:
    """A grid of tokens and how many slots its tiles take."""

    grid: Shape
    tile: Shape
    slots: int

    @property
    def padding(self) -> float:
        """Slots a token."""
        return self.slots / math.prod(self.grid)


def fit(grid: Shape, order: TileOrder) -> Fit:
    """Return how well a grid fills its tiles."""
    tile = fit_tile(grid, order.picture if grid[0] == 1 else order.video)
    cut = orders.packed if order.packed else orders.tile
    return Fit(grid, tile, len(cut(grid, tile)) * math.prod(tile))


def better(main: Grid, recipe: Recipe, most: int = 2) -> list[Fit]:
    """Return grids of about as many tokens that take fewer slots, in all and a token; none where nothing lies in tiles.

    The nearest comes first, and each wastes less than those before it.
    """
    if not isinstance(recipe.order, TileOrder):
        return []
    here, found = fit(main.shape, recipe.order), list[tuple[float, Fit]]()
    if here.padding - LESS < 1:
        return []  # there is nothing to gain
    frames = _near(main.frames) if here.tile[0] > 1 else [main.frames]
    for grid in ((f, h, w) for f in frames for h in _near(main.height) for w in _near(main.width)):
        if abs(math.prod(grid) / main.length - 1) <= REACH and (made := fit(grid, recipe.order)).slots < here.slots:
            far = sum(abs(math.log(n / of)) for n, of in zip(grid, main.shape, strict=True))
            found.append((far, made))
    kept, best = list[Fit](), here.padding - LESS
    for _, made in sorted(found, key=lambda pair: pair[0]):
        if made.padding < best and len(kept) < most:
            kept.append(made)
            best = made.padding - LESS
    return kept


def _near(side: int) -> range:
    reach = min(MOST, max(1, round(side * REACH))) if side > 1 else 0
    return range(max(1, side - reach), side + reach + 1)
