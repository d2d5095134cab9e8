"""Axis 3 exact to the token: neighbourhoods and disks as two branches, the shape itself and the text around it.

Blocks that the shape covers whole are computed as they are, blocks that it cuts ask the kernel's closed-form
predicate, and all pairs with text form a second, disjoint branch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ..config import DiskSelect, NeighborhoodSelect
from ..kernels.block_sparse import Predicate
from ..layout import Grid, TokenLayout
from .plan import Branch, Plan, from_units
from .shapes import Mask, Numbers, fit_kernel, wanted, window
from .tiling import Tiling


def exact_plan(
    tiling: Tiling, select: NeighborhoodSelect | DiskSelect, share: float | None, device: torch.device
) -> Plan:
    """Return the plan of a token-exact shape; `share` of the grid's pairs is asked where the size is not fixed."""
    coords = _coordinates(tiling.layout)
    if isinstance(select, NeighborhoodSelect):
        predicate, low, high, inside = _box(tiling, select, share, coords, device)
    else:
        predicate, low, high, inside = _disk(tiling, select, share, coords, device)
    touched, whole = low & tiling.grid[:, None] & tiling.grid, high & tiling.grid[:, None] & tiling.grid
    text = ~(tiling.grid[:, None] & tiling.grid)
    cut = tiling.on(device).cut
    shape = from_units(torch.from_numpy(touched)[None, None].to(device), cut)
    covered = from_units(torch.from_numpy(whole & touched)[None, None].to(device), cut)
    branch = _with_predicate(shape.branches[0], covered.branches[0], predicate)
    pairs = torch.tensor(inside, dtype=torch.int64, device=device).view(1, 1)
    if not text.any():
        return replace(shape, branches=(branch,), pairs=pairs)
    words = from_units(torch.from_numpy(text)[None, None].to(device), cut)
    assert words.pairs is not None
    beside = replace(words.branches[0], pack=False)  # nearly all of its queries see nothing but the text
    return replace(shape, branches=(branch, beside), pairs=pairs + words.pairs)


def _with_predicate(shape: Branch, covered: Branch, predicate: Predicate) -> Branch:
    """List the covered blocks without holes first, as full ones, and have the others ask the predicate."""
    assert covered.full_count is not None
    key_blocks = shape.index.shape[-1]
    used = torch.arange(key_blocks, device=shape.index.device) < covered.full_count[..., None]
    target = torch.where(used, covered.index, key_blocks).long()
    full = torch.zeros(*shape.index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=shape.index.device)
    full = full.scatter_(-1, target, True)[..., :key_blocks]
    rank = shape.block_mask(key_blocks).to(torch.uint8) + full.to(torch.uint8)
    index = rank.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    return replace(shape, index=index, full_count=full.sum(-1, dtype=torch.int32), predicate=predicate)


def _coordinates(layout: TokenLayout) -> Numbers:
    """Return each token's place on the main grid, int64 [3, tokens]; references are scaled to it, text lies at 0."""
    out = np.zeros((3, layout.length), dtype=np.int64)
    for start, segment in layout.spans():
        if isinstance(segment, Grid):
            own = np.stack(np.unravel_index(np.arange(segment.length), segment.shape))
            scaled = own * np.array(layout.main.shape)[:, None] // np.array(segment.shape)[:, None]
            out[:, start : start + segment.length] = scaled
    return out


def _per_unit(tiling: Tiling, values: Numbers) -> tuple[Numbers, Numbers]:
    """Return the least and the largest value among each unit's tokens, int64 [..., units]."""
    slots = tiling.slots.reshape(tiling.units, -1)
    picked = values[..., slots.clip(min=0)]
    hole = slots < 0
    big = np.iinfo(np.int64).max
    return np.where(hole, big, picked).min(-1), np.where(hole, -big, picked).max(-1)


def _upload(values: Numbers, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device)


def _places(layout: TokenLayout) -> list[list[Numbers]]:
    """Return the places of each grid on each axis, on the main grid's scale."""
    grids = [s for s in layout.segments if isinstance(s, Grid)]
    return [
        [np.arange(own) * main // own for own, main in zip(grid.shape, layout.main.shape, strict=True)]
        for grid in grids
    ]


# The neighbourhood -------------------------------------------------------------------------------------------------
def _box(
    tiling: Tiling, select: NeighborhoodSelect, share: float | None, coords: Numbers, device: torch.device
) -> tuple[Predicate, Mask, Mask, int]:
    """The neighbourhood as a box: query coordinates are twice the window's middle, key coordinates twice the key's."""
    extent = tiling.layout.main.shape
    stride = select.stride or tiling.side or (1, 1, 1)
    places = _places(tiling.layout)

    def windows(kernel: tuple[int, ...]) -> list[tuple[Numbers, Numbers, Numbers]]:
        return [window(extent[a], kernel[a], stride[a], select.dilation[a]) for a in range(3)]

    cells = (tiling.layout.length - tiling.layout.text) ** 2
    kernel = select.kernel or fit_kernel(
        extent, wanted(share), lambda k: _box_pairs(windows(k), places) / cells, select.along
    )
    axes = windows(kernel)
    first, last, number = (np.stack([axes[a][i][coords[a]] for a in range(3)]) for i in range(3))
    radius = [int((axes[a][1] - axes[a][0])[0]) for a in range(3)]
    start, end, key = (_per_unit(tiling, values) for values in (first, last, number))
    touched = (start[0][:, :, None] <= key[1][:, None]) & (key[0][:, None] <= end[1][:, :, None])
    whole = (start[1][:, :, None] <= key[0][:, None]) & (key[1][:, None] <= end[0][:, :, None])
    predicate = Predicate(
        "box", (radius[0], radius[1], radius[2]), _upload(first + last, device), _upload(2 * number, device)
    )
    everywhere = (np.logical_and.reduce(touched), np.logical_and.reduce(whole))
    return predicate, *everywhere, _box_pairs(axes, places)


def _box_pairs(axes: list[tuple[Numbers, Numbers, Numbers]], places: list[list[Numbers]]) -> int:
    """Count the pairs of grid tokens in the window: axes are independent, so their counts multiply."""
    total = 0
    for queries in places:
        for keys in places:
            counts = []
            for (first, last, number), q, k in zip(axes, queries, keys, strict=True):
                seen = (first[q][:, None] <= number[k]) & (number[k] <= last[q][:, None])
                counts.append(int(seen.sum()))
            total += math.prod(counts)
    return total


# The disk ----------------------------------------------------------------------------------------------------------
def _disk(
    tiling: Tiling, select: DiskSelect, share: float | None, coords: Numbers, device: torch.device
) -> tuple[Predicate, Mask, Mask, int]:
    """The disk, with coordinates scaled so that an integer radius tells squared distances apart exactly."""
    apart = _distances(tiling.layout)
    if select.radius is not None:
        frames, reach, scale = select.frames, *_integer_radius(math.ceil(select.radius**2) - 1)
    else:
        frames, reach = _fit_disk(apart, tiling.layout, wanted(share))
        scale = QUARTERS
    low, high = _per_unit(tiling, coords)
    gap = np.maximum(np.maximum(low[:, None] - high[:, :, None], low[:, :, None] - high[:, None]), 0)
    far = np.maximum(high[:, None] - low[:, :, None], high[:, :, None] - low[:, None])
    touched, whole = ((d[0] <= frames) & (scale**2 * (d[1] ** 2 + d[2] ** 2) <= reach**2) for d in (gap, far))
    scaled = coords * np.array([1, scale, scale])[:, None]
    predicate = Predicate("disk", (frames, reach, 0), _upload(scaled, device), _upload(scaled, device))
    return predicate, touched, whole, _disk_pairs(apart, frames, (reach / scale) ** 2)


QUARTERS = 4  # a disk fitted to a density has a radius in quarters of a token


def _integer_radius(limit: int) -> tuple[int, int]:
    """Return r and c such that, for whole d, d² <= limit exactly when (c d)² <= r²."""
    scale = 1
    while True:
        radius = math.isqrt(scale**2 * (limit + 1) - 1)
        if radius**2 >= scale**2 * limit:
            return radius, scale
        scale += 1


def _distances(layout: TokenLayout) -> list[list[npt.NDArray[np.float64]]]:
    """Count the token pairs at each distance on each axis, for all pairs of grids together with their order kept."""
    places = _places(layout)
    return [
        [np.bincount(np.abs(q[:, None] - k).reshape(-1)).astype(np.float64) for q, k in zip(a, b, strict=True)]
        for a in places
        for b in places
    ]


def _disk_pairs(apart: list[list[npt.NDArray[np.float64]]], frames: int, limit: float) -> int:
    """Count the pairs of grid tokens within `frames` and a squared distance of `limit`."""
    total = 0.0
    for f, h, w in apart:
        squares = np.arange(len(h))[:, None] ** 2 + np.arange(len(w)) ** 2
        total += f[: frames + 1].sum() * np.outer(h, w)[squares <= limit + 1e-9].sum()
    return int(total)


def _fit_disk(apart: list[list[npt.NDArray[np.float64]]], layout: TokenLayout, share: float) -> tuple[int, int]:
    """Choose the frames and the radius in quarter tokens nearest to the share, as long in time as wide in space."""
    frames, height, width = layout.main.shape
    cells = (layout.length - layout.text) ** 2
    longest = math.ceil(QUARTERS * math.hypot(height, width))
    best = (math.inf, 0, 0)
    for reach in range(frames):
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            if _disk_pairs(apart, reach, (middle / QUARTERS) ** 2) / cells > share:
                high = middle
            else:
                low = middle
        for radius in (low, high):
            off = abs(_disk_pairs(apart, reach, (radius / QUARTERS) ** 2) / cells / share - 1)
            spread = abs((2 * reach + 1) / frames - min(2 * radius / QUARTERS / min(height, width), 1.0))
            best = min(best, (off + 0.1 * spread * (frames > 1), reach, radius))
    return best[1], best[2]
