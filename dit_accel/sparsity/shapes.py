"""Axis 3 by place alone: which unit pairs a geometric rule computes, whatever the content.

Every rule takes a tiling, its settings and the share of the grid's token pairs that may be computed (None where the
settings fix the size), and returns a boolean mask over grid units [units, units]. The two rules that are exact to the
token live in `exact.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..config import BandSelect, ColumnSelect, NeighborhoodSelect, RadialSelect, Select
from ..layout import Grid
from .tiling import Tiling

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def unit_mask(tiling: Tiling, select: Select, share: float | None) -> Mask:
    """Return which grid unit pairs a geometric rule computes, bool [units, units] (cached: do not write to it)."""
    if isinstance(select, NeighborhoodSelect):
        return neighborhood(tiling, select, share)
    if isinstance(select, RadialSelect):
        return radial(tiling, select, share)
    if isinstance(select, BandSelect):
        return band(tiling, share)
    if isinstance(select, ColumnSelect):
        return columns(tiling, share)
    units = int(tiling.grid.sum())
    return np.full((units, units), select.kind == "all")


def wanted(share: float | None) -> float:
    """Return the share of pairs asked of a rule, 1 if none is; 0 (text alone is above the density) is the least."""
    return 1.0 if share is None else max(share, 1e-9)


def sizes(tiling: Tiling) -> npt.NDArray[np.float64]:
    """Return the tokens of each grid unit, float64 [units]."""
    return tiling.tokens[tiling.grid].astype(np.float64)


def share_of(mask: Mask, tokens: npt.NDArray[np.float64]) -> float:
    """Return which share of the token pairs a unit mask computes."""
    return float(tokens @ mask @ tokens) / float(tokens.sum()) ** 2


# The sliding window ------------------------------------------------------------------------------------------------
def window(length: int, kernel: int, stride: int = 1, dilation: int = 1) -> tuple[Numbers, Numbers, Numbers]:
    """Return each position's window on one axis: first and last key, and the keys' own numbers, int64 [length] each.

    Key j is seen by query i when first[i] <= number[j] <= last[i]. Positions of one residue modulo `dilation` form a
    group of their own; inside it the queries of a run of `stride` share the window of their middle one, which holds
    `kernel` keys and is moved inside the group at its ends. GNA, Hassani et al. 2025, arXiv 2504.16922; one kernel
    more to the left of an even window's middle.
    """
    at = np.arange(length)
    residue, place = at % dilation, at // dilation
    group = (length - 1 - residue) // dilation + 1  # how long each position's group is
    leader = np.minimum(place // stride * stride + stride // 2, group - 1)
    held = max(min(kernel, length // dilation), 1)  # the shortest group still holds a whole window
    first = np.clip(leader - held // 2, 0, np.maximum(group - held, 0))
    apart = residue * length  # groups never meet
    return apart + first, apart + first + held - 1, apart + place


def neighborhood(tiling: Tiling, select: NeighborhoodSelect, share: float | None) -> Mask:
    """Take the tiles of a window around each tile, moved inside the grid at its borders.

    Sliding Tile Attention, Zhang et al. 2025, arXiv 2502.04507 (there on divisible grids only).
    """
    if tiling.side is None:
        raise ValueError("a neighbourhood of tiles needs tiles")
    at = tiling.position[tiling.grid].astype(np.int64)
    counts = tuple(-(-g // s) for g, s in zip(tiling.layout.main.shape, tiling.side, strict=True))
    stride = select.stride or (1, 1, 1)

    def mask(kernel: tuple[int, ...]) -> Mask:
        out = np.ones((len(at), len(at)), dtype=bool)
        for axis in range(3):
            first, last, number = window(counts[axis], kernel[axis], stride[axis], select.dilation[axis])
            i = np.minimum(at[:, axis], counts[axis] - 1)
            out &= (first[i][:, None] <= number[i]) & (number[i] <= last[i][:, None])
        return out

    if select.kernel is not None:
        return mask(select.kernel)
    tokens = sizes(tiling)
    return mask(fit_kernel(counts, wanted(share), lambda kernel: share_of(mask(kernel), tokens), select.along))


def fit_kernel(
    extent: tuple[int, ...], share: float, measure: Callable[[tuple[int, ...]], float], along: str = ""
) -> tuple[int, ...]:
    """Choose the kernel whose measured share of pairs is nearest to `share`.

    It is about the same share of every axis but those of `along` ("f", "h", "w"), which it spans whole.
    """
    axes = [axis for axis in range(3) if extent[axis] > 1 and "fhw"[axis] not in along]
    even = share ** (1 / max(len(axes), 1))
    around = []
    for axis in range(3):
        if axis not in axes:
            around.append([extent[axis]])
            continue
        ideal = even * extent[axis]
        near = {int(np.floor(ideal)), int(np.ceil(ideal)), int(np.floor(ideal)) - 1, int(np.ceil(ideal)) + 1}
        around.append(sorted({min(max(n, 1), extent[axis]) for n in near}))
    options = [(f, h, w) for f in around[0] for h in around[1] for w in around[2]]

    def lopsided(kernel: tuple[int, ...]) -> float:
        parts = [kernel[axis] / (even * extent[axis]) for axis in axes]
        return float(np.ptp(np.log(parts))) if parts else 0.0

    # a lopsided window is worse than a density that is a little off: one part in ten of the sides weighs 1 % of pairs
    return min(options, key=lambda kernel: abs(measure(kernel) / share - 1) + 0.1 * lopsided(kernel))


# Bands of a sequence -----------------------------------------------------------------------------------------------
def band(tiling: Tiling, share: float | None) -> Mask:
    """Take the units nearest in the order, by the distance of their middles, as many as the share allows.

    The two patterns of Sparse VideoGen, Xi et al. 2025, arXiv 2502.01776: |i - j| < w in frame-major order for spatial
    heads, in position-major order for temporal ones. There w = S (1 - sqrt(1 - density)); here whole blocks count.
    """
    tokens = sizes(tiling)
    middle = tokens.cumsum() - tokens / 2
    apart = np.abs(middle[:, None] - middle)
    return apart <= _cut(apart, np.outer(tokens, tokens), wanted(share))


def _cut(apart: npt.NDArray[np.float64], cost: npt.NDArray[np.float64], share: float) -> float:
    """Return the distance up to which pairs cover the share of the cost that is nearest to the one asked."""
    order = np.argsort(apart, axis=None, kind="stable")
    distance, spent = apart.reshape(-1)[order], cost.reshape(-1)[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(distance) > 1e-9, True))  # equal distances come or go together
    return float(distance[last[np.abs(spent[last] / spent[-1] - share).argmin()]]) + 1e-9


def columns(tiling: Tiling, share: float | None) -> Mask:
    """Take the same evenly spaced key units for all queries: vertical stripes.

    One of the patterns of Sparse-vDiT, Chen et al. 2025, arXiv 2506.03065, which leaves the columns' choice open.
    """
    units = int(tiling.grid.sum())
    count = min(max(round(wanted(share) * units), 1), units)
    picked = (np.arange(count) * units + units // 2) // count
    mask = np.zeros((units, units), dtype=bool)
    mask[:, np.minimum(picked, units - 1)] = True
    return mask


# Energy decay over frames ------------------------------------------------------------------------------------------
def radial(tiling: Tiling, select: RadialSelect, share: float | None) -> Mask:
    """Take a band in each pair of frames, half as wide at each doubling of their distance.

    Radial Attention, Li et al. 2025, arXiv 2506.19852. Where the band would be narrower than a unit, only each n-th
    frame distance is kept instead. With an asked share the decay is found by bisection, and also narrows the band
    within a frame and to the next one, which the paper keeps (a picture is a single frame).
    """
    slices = _slices(tiling)
    if share is None:
        return _radial(slices, tiling, select.decay, narrow=False)
    tokens, low, high = sizes(tiling), 1e-3, 16.0
    for _ in range(24):
        decay = (low * high) ** 0.5
        if share_of(_radial(slices, tiling, decay, narrow=True), tokens) > share:
            high = decay
        else:
            low = decay
    masks = [_radial(slices, tiling, decay, narrow=True) for decay in (low, high)]
    return min(masks, key=lambda mask: abs(share_of(mask, tokens) - share))


def _slices(tiling: Tiling) -> npt.NDArray[np.float64]:
    """Return frame, first and last place in the frame of each grid unit, places on the main grid's scale [units, 3]."""
    main, rows = tiling.layout.main, []
    units = tiling.slots.reshape(tiling.units, -1)
    for start, segment in tiling.layout.spans():
        if not isinstance(segment, Grid):
            continue
        plane = segment.height * segment.width
        scale = main.height * main.width / plane
        for unit in units[(units[:, 0] >= start) & (units[:, 0] < start + segment.length)]:
            real = unit[unit >= 0] - start
            rows.append((real[0] // plane, real[0] % plane * scale, (real[-1] % plane + 1) * scale - 1))
    return np.array(rows)


def _radial(units: npt.NDArray[np.float64], tiling: Tiling, decay: float, narrow: bool) -> Mask:
    plane = tiling.layout.main.height * tiling.layout.main.width
    frames = units[:, 0].astype(np.int64)
    spans, which = np.unique(units[:, 1:], axis=0, return_inverse=True)
    which = which.reshape(-1)
    near = np.zeros((int(frames.max()) + 1, len(spans), len(spans)), dtype=bool)
    for apart in range(len(near)):
        width = _width(apart, plane, tiling.unit, decay, narrow)
        if width is not None:
            near[apart] = _dense_enough(spans, width)
    return near[np.abs(frames[:, None] - frames), which[:, None], which]


def _width(apart: int, plane: int, unit: int, decay: float, narrow: bool) -> float | None:
    """Return the half width of the band between frames `apart`, None where such frames do not meet."""
    full = 2.0 ** (plane.bit_length() - apart.bit_length())
    if full < unit and apart % int(unit / full):
        return None
    decayed = max(full * decay, float(unit))
    if apart > 1:
        return decayed
    kept = float(plane if apart == 0 else plane // 2)
    return min(kept, decayed) if narrow else kept


def _dense_enough(spans: npt.NDArray[np.float64], width: float) -> Mask:
    """Say of which unit pairs more than 0.6 of the columns that a band touches are covered to more than a third."""
    first, last = spans[:, 0], spans[:, 1]
    out = np.zeros((len(spans), len(spans)), dtype=bool)
    for j, (start, end) in enumerate(spans):
        column = np.arange(start, end + 0.5)
        low = np.maximum(column[None] - width, first[:, None])
        high = np.minimum(column[None] + width, last[:, None])
        covered = np.clip(np.floor(high) - np.ceil(low) + 1, 0, None) / (last - first + 1)[:, None]
        touched = (covered > 0).sum(-1)
        out[:, j] = (covered > 1 / 3).sum(-1) > 0.6 * np.maximum(touched, 1e-9)
    return out
