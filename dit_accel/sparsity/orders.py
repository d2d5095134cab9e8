"""Axis 1, order: in which order the tokens of a grid lie, so that what belongs together shares a block.

An order maps a grid of (frames, height, width) tokens to a list of *units*: arrays of raster token indices that
will share blocks. Every order works on any grid; ragged units are simply shorter.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Shape = tuple[int, int, int]


def runs(sequence: Array, length: int) -> list[Array]:
    """Cut a token sequence into consecutive runs of `length` tokens, the last one shorter."""
    return [sequence[start : start + length] for start in range(0, len(sequence), length)]


def raster(grid: Shape, unit: int) -> list[Array]:
    """Leave the tokens as the model has them: frame by frame, row by row."""
    return runs(np.arange(np.prod(grid), dtype=np.int64), unit)


def tile(grid: Shape, size: Shape) -> list[Array]:
    """Cut the grid into tiles of `size` tokens, raster order inside and between the tiles.

    Border tiles are smaller where the grid is not a multiple of the tile (GRAT, Ren et al. 2025; Sliding Tile
    Attention, Zhang et al. 2025; DraftAttention, Shen et al. 2025 use such tiles on divisible grids only).
    """
    tokens = np.arange(np.prod(grid), dtype=np.int64).reshape(grid)
    starts = [range(0, extent, step) for extent, step in zip(grid, size, strict=True)]
    return [
        tokens[f : f + size[0], h : h + size[1], w : w + size[2]].reshape(-1)
        for f in starts[0]
        for h in starts[1]
        for w in starts[2]
    ]


def hilbert(grid: Shape, unit: int) -> list[Array]:
    """Follow a Hilbert curve through the grid and cut it into runs of `unit` tokens.

    The curve is that of the smallest enclosing power-of-two cube (square for pictures), the cells outside the
    grid left out, so any grid works; Skilling, "Programming the Hilbert curve" (2004).
    """
    coords = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1).astype(np.int64)
    axes = [axis for axis in range(3) if grid[axis] > 1] or [2]
    bits = max(1, int(max(grid) - 1).bit_length())
    key = _hilbert_key(coords[:, axes], bits)
    return runs(np.argsort(key, kind="stable").astype(np.int64), unit)


def _hilbert_key(points: Array, bits: int) -> Array:
    """Return each point's position along the Hilbert curve of 2**bits cells a side."""
    x = points.T.copy()
    n = len(x)
    q = 1 << (bits - 1)
    while q > 1:  # undo the rotations and reflections, from the coarsest level down
        low = q - 1
        for i in range(n):
            flip = (x[i] & q) != 0
            swap = np.where(flip, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(flip, x[0] ^ low, x[0] ^ swap)
            x[i] ^= swap
        q >>= 1
    for i in range(1, n):  # Gray code
        x[i] ^= x[i - 1]
    flip = np.zeros_like(x[0])
    q = 1 << (bits - 1)
    while q > 1:
        flip = np.where((x[n - 1] & q) != 0, flip ^ (q - 1), flip)
        q >>= 1
    x ^= flip
    key = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for i in range(n):
            key = (key << 1) | ((x[i] >> bit) & 1)
    return key


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


ORDERS: dict[str, Callable[..., list[Array]]] = {"raster": raster, "tile": tile, "hilbert": hilbert}
