"""Axis 1, order: in which order the tokens of a grid lie, so that what belongs together shares a block.

An order maps a grid of (frames, height, width) tokens to a list of *units*: arrays of raster token indices that
will share blocks. Every order works on any grid; ragged units are simply shorter.
"""

from __future__ import annotations

import numpy as np

from . import curves
from .curves import Array, Shape


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
    return [
        part[f : f + size[0], h : h + size[1], w : w + size[2]].reshape(-1)
        for part in parts
        for f in range(0, part.shape[0], size[0])
        for h in range(0, part.shape[1], size[1])
        for w in range(0, part.shape[2], size[2])
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
