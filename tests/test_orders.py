"""Axis 1: orders are permutations of any grid, and near tokens share units."""

from __future__ import annotations

import numpy as np
import pytest

from dit_accel.config import HilbertOrder, RasterOrder, TileOrder
from dit_accel.layout import Grid, Pad, Text, TokenLayout
from dit_accel.sparsity import orders
from dit_accel.sparsity.tiling import tiling

GRIDS = [(1, 1, 1), (1, 8, 8), (1, 17, 23), (5, 17, 23), (3, 1, 7), (8, 8, 8), (2, 33, 5)]
TILES = {"picture": (1, 4, 4), "video": (2, 4, 4)}
ORDERS = [RasterOrder(), TileOrder(**TILES), TileOrder(**TILES, packed=True), HilbertOrder()]
IDS = ["raster", "tile", "packed", "hilbert"]


@pytest.mark.parametrize("order", ORDERS, ids=IDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_stands_once(order: RasterOrder | TileOrder | HilbertOrder, grid: tuple[int, int, int]) -> None:
    layout = TokenLayout([Text(7), Grid(*grid), Pad(3)])
    cut = tiling(layout, order, 64, 32)
    real = cut.slots[cut.slots >= 0]
    assert sorted(real) == list(range(layout.length))
    assert cut.tokens.sum() == layout.length
    assert len(cut.slots) == cut.units * cut.unit
    assert cut.unit % cut.block_q == cut.unit % cut.block_k == 0


@pytest.mark.parametrize("order", ORDERS, ids=IDS)
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


def test_packed_borders_hold_whole_strips() -> None:
    """5 x 6 in tiles of 4 x 4: the right border of 2 columns is one tile, the lower one of a row another."""
    tiles = orders.packed((1, 5, 6), (1, 4, 4))
    assert list(tiles[1]) == [4, 5, 10, 11, 16, 17, 22, 23, 28, 29]
    assert list(tiles[2]) == [24, 25, 26, 27]
    assert len(tiles) == 3


@pytest.mark.parametrize("size", [(1, 8, 16), (4, 8, 8), (4, 4, 4), (2, 3, 5)])
def test_packed_tiles_are_full_where_tiles_fit_and_few_where_not(size: orders.Shape) -> None:
    """Wan's and HunyuanVideo's grids, and random ones: each token once, no tile too large, hardly more than must be."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    random = [tuple(int(n) for n in row) for row in np.random.default_rng(seed).integers(1, 60, (12, 3))]
    most = int(np.prod(size))
    for grid in [(21, 30, 52), (21, 45, 80), (33, 45, 80), (28, 37, 29), *random]:
        size_here = tuple(min(s, g) for s, g in zip(size, grid, strict=True))
        pieces = orders.packed(grid, (size_here[0], size_here[1], size_here[2]))
        lengths, limit = [len(piece) for piece in pieces], int(np.prod(size_here))
        assert np.array_equal(np.sort(np.concatenate(pieces)), np.arange(np.prod(grid)))
        assert max(lengths) <= limit
        assert lengths.count(limit) >= np.prod([g // s for g, s in zip(grid, size_here, strict=True)])
        if min(grid) >= 21:
            assert len(pieces) * most <= 1.1 * np.prod(grid), (grid, len(pieces))


def test_packed_tiles_lie_where_their_tokens_do() -> None:
    """Whole tiles are as far from each other as on the lattice, of 10 x 7 tiles here, the last column cut."""
    layout = TokenLayout(grid=(1, 80, 104))
    lattice, packed = (tiling(layout, TileOrder(picture=(1, 8, 16), packed=p), 128, 128) for p in (False, True))
    assert lattice.side == (1, 8, 16)
    assert packed.side is None  # nothing may count tiles along an axis
    whole = [7 * row + column for row in range(10) for column in range(6)]
    moved = packed.position[: len(whole)] - lattice.position[whole]
    assert np.allclose(moved, moved[0])


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


@pytest.mark.parametrize(
    ("cells", "runs"),
    [(75600, (128, 64)), (32768, (128, 64)), (32767, (128, 32)), (4096, (128, 16)), (4095, (64, 16)), (9, (64, 16))],
)
def test_runs_shrink_with_the_grid(cells: int, runs: tuple[int, int]) -> None:
    assert orders.fit_runs(cells, 128, 64) == runs


def test_runs_stay_as_short_as_asked() -> None:
    assert orders.fit_runs(75600, 32, 64) == (32, 32)
    assert orders.fit_runs(9, 32, 16) == (32, 16)
