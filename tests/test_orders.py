"""Axis 1: orders are permutations of any grid, and near tokens share units."""

from __future__ import annotations

import numpy as np
import pytest

from dit_accel.config import HilbertOrder, RasterOrder, TileOrder
from dit_accel.layout import Grid, Pad, Text, TokenLayout
from dit_accel.sparsity import orders
from dit_accel.sparsity.tiling import tiling

GRIDS = [(1, 1, 1), (1, 8, 8), (1, 17, 23), (5, 17, 23), (3, 1, 7), (8, 8, 8), (2, 33, 5)]
ORDERS = [RasterOrder(), TileOrder(picture=(1, 4, 4), video=(2, 4, 4)), HilbertOrder()]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o.kind)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_stands_once(order: RasterOrder | TileOrder | HilbertOrder, grid: tuple[int, int, int]) -> None:
    layout = TokenLayout([Text(7), Grid(*grid), Pad(3)])
    cut = tiling(layout, order, 64, 32)
    real = cut.slots[cut.slots >= 0]
    assert sorted(real) == list(range(layout.length))
    assert cut.tokens.sum() == layout.length
    assert len(cut.slots) == cut.units * cut.unit
    assert cut.unit % cut.block_q == cut.unit % cut.block_k == 0


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o.kind)
def test_units_never_mix_text_and_grid(order: RasterOrder | TileOrder | HilbertOrder) -> None:
    layout = TokenLayout([Text(7), Grid(1, 9, 5), Pad(3), Grid(1, 3, 3, role="reference")])
    cut = tiling(layout, order, 32, 32)
    for unit, is_grid in zip(cut.slots.reshape(cut.units, cut.unit), cut.grid, strict=True):
        tokens = unit[unit >= 0]
        on_grid = ((tokens >= 7) & (tokens < 52)) | (tokens >= 55)
        assert (on_grid == is_grid).all()


@pytest.mark.parametrize("side", [2, 4, 8, 16])
@pytest.mark.parametrize("axes", [2, 3])
def test_hilbert_steps_are_neighbours_on_powers_of_two(side: int, axes: int) -> None:
    grid = (side if axes == 3 else 1, side, side)
    path = np.concatenate(orders.hilbert(grid, 64))
    cells = np.stack(np.unravel_index(path, grid), -1)
    assert np.abs(np.diff(cells, axis=0)).sum(1).max() == 1


def test_hilbert_runs_are_more_compact_than_raster_runs() -> None:
    def spread(units: list[np.ndarray]) -> float:
        cells = [np.stack(np.unravel_index(u, (5, 17, 23)), -1) for u in units]
        return float(np.mean([np.ptp(c, axis=0).sum() for c in cells]))

    assert spread(orders.hilbert((5, 17, 23), 64)) < 0.6 * spread(orders.raster((5, 17, 23), 64))


def test_tiles_hold_the_cells_of_their_box() -> None:
    tiles = orders.tile((1, 5, 6), (1, 4, 4))
    assert [len(t) for t in tiles] == [16, 8, 4, 2]
    assert list(tiles[1]) == [4, 5, 10, 11, 16, 17, 22, 23]


@pytest.mark.parametrize(
    ("grid", "size", "expected"),
    [
        ((1, 256, 256), (1, 16, 16), (1, 16, 16)),
        ((1, 32, 32), (1, 16, 16), (1, 8, 8)),
        ((1, 4, 4), (1, 16, 16), (1, 4, 4)),
        ((33, 45, 80), (4, 8, 8), (4, 8, 8)),
    ],
)
def test_tiles_shrink_on_small_grids_only(grid: orders.Shape, size: orders.Shape, expected: orders.Shape) -> None:
    assert orders.fit_tile(grid, size) == expected


def test_raster_without_holes_needs_no_order() -> None:
    assert tiling(TokenLayout(grid=(1, 8, 16)), RasterOrder(), 64, 64).identity
    assert tiling(TokenLayout(grid=(1, 5, 5)), RasterOrder(), 16, 16).identity
    assert not tiling(TokenLayout(grid=(1, 8, 16), text=5), RasterOrder(), 64, 64).identity
    assert not tiling(TokenLayout(grid=(1, 8, 16)), HilbertOrder(), 64, 64).identity
