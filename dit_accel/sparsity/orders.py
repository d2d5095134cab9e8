"""Axis 1, order: in which order the tokens of a grid lie, so that what belongs together shares a block.

An order maps a grid of (frames, height, width) tokens to a list of *units*: arrays of raster token indices that
will share blocks. Every order works on any grid; ragged units are simply shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np

from . import curves
from .curves import Array, Shape

Box = tuple[slice, ...]


def runs(sequence: Array, length: int) -> list[Array]:
    """Cut a token sequence into consecutive runs of `length` tokens, the last one shorter."""
    return [sequence[start : start + length] for start in range(0, len(sequence), length)]


def raster(grid: Shape, unit: int) -> list[Array]:
    """Leave the tokens as the model has them: frame by frame, row by row."""
    return runs(np.arange(np.prod(grid), dtype=np.int64), unit)


def tile(grid: Shape, size: Shape, dilation: Shape = (1, 1, 1)) -> list[Array]:
    """Cut the grid into tiles of `size` tokens, raster order inside and between the tiles.

    Border tiles are smaller where the grid is not a multiple of the tile (GRAT, Ren et al. 2025; Sliding Tile
    Attention, Zhang et al. 2025; DraftAttention, Shen et al. 2025 use such tiles on divisible grids only). With a
    `dilation` the tokens of one residue on every axis are tiled by themselves.
    """
    tokens = np.arange(np.prod(grid), dtype=np.int64).reshape(grid)
    residues = np.ndindex(*(min(d, g) for d, g in zip(dilation, grid, strict=True)))
    parts = [tokens[f :: dilation[0], h :: dilation[1], w :: dilation[2]] for f, h, w in residues]
    return [piece for part in parts for piece in _cut(part, size)]


def packed(grid: Shape, size: Shape) -> list[Array]:
    """Cut the grid into tiles of `size` where they fit whole, and each border into tiles of its own best shape.

    Which border takes the corners is tried out: the way with fewest tiles counts. What a tile leaves over on an axis
    would else be a slice of small tiles, each in a kernel block of its own that is mostly empty: 336 blocks of 128
    slots for 21 x 30 x 52 tokens in tiles of 1 x 8 x 16, where 256 would hold them.
    Every pair of such blocks is computed, so the waste counts twice.
    """
    tokens = np.arange(np.prod(grid), dtype=np.int64).reshape(grid)
    left = [axis for axis in (2, 1, 0) if grid[axis] % size[axis]]
    inner, *borders = min(
        (_borders(grid, size, axes) for axes in permutations(left)),
        key=lambda boxes: sum(_count(_extent(box), fullest_tile(_extent(box), size)) for box in boxes[1:]),
    )
    pieces = _cut(tokens[inner], size)
    for border in borders:
        pieces += _cut(tokens[border], fullest_tile(_extent(border), size))
    return pieces


def _borders(grid: Shape, size: Shape, axes: Sequence[int]) -> list[Box]:
    """Return the box that tiles fill, and what they leave over: along each axis in turn, the first with the corners."""
    rest = [slice(0, n) for n in grid]
    found: list[Box] = []
    for axis in axes:
        end = grid[axis] // size[axis] * size[axis]
        border = [*rest]
        border[axis], rest[axis] = slice(end, grid[axis]), slice(0, end)
        if all(side.stop > side.start for side in border):
            found.append(tuple(border))
    return [tuple(rest), *found]


def _extent(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def _count(box: tuple[int, ...], side: tuple[int, ...]) -> int:
    """Return how many tiles cover a box."""
    return int(np.prod([-(-n // s) for n, s in zip(box, side, strict=True)]))


def fullest_tile(box: tuple[int, ...], size: Shape) -> Shape:
    """Return the shape that covers a box with fewest tiles of no more tokens than `size`, of these the likest to it."""
    most = int(np.prod(size))

    def cost(side: Shape) -> tuple[int, float]:
        return _count(box, side), sum(abs(math.log(a / b)) for a, b in zip(side, size, strict=True))

    def even(most: int, extent: int) -> int:
        return -(-extent // -(-extent // min(most, extent)))

    sides = (
        (frames, rows, even(most // (frames * rows), box[2]))
        for frames in range(1, min(most, box[0]) + 1)
        for rows in range(1, min(most // frames, box[1]) + 1)
    )
    return min(sides, key=cost)


def _cut(tokens: Array, size: Shape) -> list[Array]:
    """Cut a box of tokens into tiles, raster order inside and between them, those at its end smaller."""
    return [
        tokens[f : f + size[0], h : h + size[1], w : w + size[2]].reshape(-1)
        for f in range(0, tokens.shape[0], size[0])
        for h in range(0, tokens.shape[1], size[1])
        for w in range(0, tokens.shape[2], size[2])
    ]


def hilbert(grid: Shape, unit: int) -> list[Array]:
    """Follow a Hilbert curve through the grid and cut it into runs of `unit` tokens."""
    return runs(curves.hilbert(grid), unit)


def gilbert(grid: Shape, unit: int) -> list[Array]:
    """Follow a generalised Hilbert curve through the grid and cut it into runs of `unit` tokens."""
    return runs(curves.gilbert(grid), unit)


def by_axes(grid: Shape, unit: int, axes: str, whole: bool) -> list[Array]:
    """Lay the tokens in an order of the axes, the first letter of `axes` slowest, and cut that into runs.

    With `whole` the runs end with each slice of the slowest axis. PAROAttention (Zhao et al. 2025) gives each head
    one of the six orders; Sparse VideoGen (Xi et al. 2025) uses "fhw" and, for temporal heads, "hwf".
    """
    tokens = np.arange(np.prod(grid), dtype=np.int64).reshape(grid)
    laid = tokens.transpose(["fhw".index(letter) for letter in axes])
    if not whole:
        return runs(laid.reshape(-1), unit)
    return [run for piece in laid for run in runs(piece.reshape(-1), unit)]


def fit_tile(grid: Shape, size: Shape, least_units: int = 32, least_tokens: int = 64) -> Shape:
    """Halve a paper's tile along its longest axis until a small grid holds `least_units` of them.

    Papers fix their tile for 10^4..10^5 tokens; on a 32 x 32 grid a 16 x 16 tile would leave four choices. A tile
    is never made smaller than `least_tokens`, below which blocks are mostly padding.
    """
    side = [min(s, g) for s, g in zip(size, grid, strict=True)]

    def units() -> int:
        return int(np.prod([-(-g // s) for g, s in zip(grid, side, strict=True)]))

    while units() < least_units and np.prod(side) >= 2 * least_tokens:
        axis = max(range(3), key=lambda a: side[a])
        side[axis] = -(-side[axis] // 2)
    return (side[0], side[1], side[2])


def fit_runs(cells: int, queries: int, keys: int, least_units: int = 32, least_keys: int = 512) -> tuple[int, int]:
    """Halve runs of queries and of keys on a small grid until it holds enough of them, to 64 and 16 tokens at least.

    Means of short runs stand better for what is skipped; on long grids there would be too many of them to weigh.
    """
    while cells < least_units * queries and queries >= 128:
        queries //= 2
    keys = min(keys, queries)
    while cells < least_keys * keys and keys >= 32:
        keys //= 2
    return queries, keys
