"""Which units of a video share a frame, or a place in any two frames: what the frame keeps are made of."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .tiling import Tiling

Pairs = npt.NDArray[np.bool_]


@lru_cache(maxsize=64)
def own_frame(tiling: Tiling) -> Pairs:
    """Return the unit pairs that hold tokens of one frame of the main grid, bool [units, units]; none for a picture.

    A unit that spans several frames counts to each of them. The spatial heads of Sparse VideoGen, Xi et al. 2025,
    arXiv 2502.01776, are of this kind.
    """
    return _meeting(tiling, axis=0)


@lru_cache(maxsize=64)
def own_place(tiling: Tiling) -> Pairs:
    """Return the unit pairs that hold tokens of one row and column in any two frames, bool [units, units].

    None for a picture. The temporal heads of Sparse VideoGen, Xi et al. 2025, arXiv 2502.01776, are of this kind.
    """
    return _meeting(tiling, axis=1)


def _meeting(tiling: Tiling, axis: int) -> Pairs:
    """Return the unit pairs with tokens of a common frame (axis 0) or place (axis 1) of the main grid."""
    main = tiling.layout.main
    if main.frames == 1:
        return np.zeros((tiling.units, tiling.units), dtype=bool)
    start = next(start for start, segment in tiling.layout.spans() if segment is main)
    slot = np.flatnonzero((tiling.slots >= start) & (tiling.slots < start + main.length))
    group = np.divmod(tiling.slots[slot] - start, main.height * main.width)[axis]
    holds = np.zeros((tiling.units, group.max() + 1), dtype=np.float32)
    holds[slot // tiling.unit, group] = 1
    return holds @ holds.T > 0
