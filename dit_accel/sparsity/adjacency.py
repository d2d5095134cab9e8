"""Which units touch each other on the grid."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..layout import Grid
from .tiling import Tiling


@lru_cache(maxsize=64)
def adjacent(tiling: Tiling) -> npt.NDArray[np.bool_]:
    """Return the unit pairs of which some tokens are neighbours, diagonals too, bool [units, units].

    Jenga, Zhang et al. 2025, arXiv 2505.16864, and Rectified SpaAttn always compute these along their curve. Grids are
    looked at one by one: a picture and its reference do not touch.
    """
    unit = np.empty(tiling.layout.length, dtype=np.int64)
    owner = np.repeat(np.arange(tiling.units), tiling.unit)
    unit[tiling.slots[tiling.slots >= 0]] = owner[tiling.slots >= 0]
    out = np.zeros((tiling.units, tiling.units), dtype=bool)
    for start, segment in tiling.layout.spans():
        if not isinstance(segment, Grid):
            continue
        cells = unit[start : start + segment.length].reshape(segment.shape)
        for shift in itertools.product((-1, 0, 1), repeat=3):
            here = tuple(slice(max(d, 0), n + min(d, 0)) for d, n in zip(shift, segment.shape, strict=True))
            there = tuple(slice(max(-d, 0), n + min(-d, 0)) for d, n in zip(shift, segment.shape, strict=True))
            out[cells[here], cells[there]] = True
    return out
