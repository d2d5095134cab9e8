"""Rules that choose by place alone, on the odd video, against slow restatements of each rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from odd_video import CELLS, GRID, LAYOUT, UNIT, Cell, planned, raster_cells, spelled_out, units_of

from dit_accel.sparsity import curves

TILES = {"kind": "tile", "video": (4, 8, 8)}
PLACES = np.array(raster_cells())
OFF = {"own": False}


def mask_of(order: dict[str, Any], select: dict[str, Any], keeps: dict[str, Any]) -> tuple[torch.Tensor, float]:
    settled = {"order": order, "select": select, "keeps": keeps}
    if select["kind"] in ("neighborhood", "disk") and "per" not in select:
        settled["keeps"] = OFF
    plan, *_ = planned(settled, heads=1)
    return plan.to_mask()[0, 0], float(plan.density())


def check(mask: torch.Tensor, density: float, expected: np.ndarray) -> None:
    """Compare a mask with what is expected among the grid's tokens; text and padding see all and are seen by all."""
    full = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    full[7 : 7 + CELLS, 7 : 7 + CELLS] = torch.from_numpy(expected)
    assert torch.equal(mask, full)
    assert density == pytest.approx(float(full.float().mean()), rel=1e-6)


def seen(length: int, kernel: int, stride: int, dilation: int) -> np.ndarray:
    """Say for all pairs of one axis whether the key lies in the query's window, moved inside its residue's line."""
    out = np.zeros((length, length), bool)
    for residue in range(min(dilation, length)):
        line = list(range(residue, length, dilation))
        held = max(min(kernel, length // dilation), 1)
        for place, i in enumerate(line):
            leader = min(place - place % stride + stride // 2, len(line) - 1)
            start = leader - held // 2
            while start < 0:
                start += 1
            while start + held > len(line):
                start -= 1
            out[i, line[start : start + held]] = True
    return out


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((3, 7, 9), (1, 1, 1), (1, 1, 1)), ((2, 8, 8), (2, 4, 4), (1, 1, 1)), ((3, 3, 5), (1, 1, 2), (1, 2, 3))],
)
def test_neighborhood(kernel: Cell, stride: Cell, dilation: Cell) -> None:
    select = {"kind": "neighborhood", "kernel": kernel, "stride": stride, "dilation": dilation}
    expected = np.ones((CELLS, CELLS), bool)
    for axis in range(3):
        at = PLACES[:, axis]
        expected &= seen(GRID[axis], kernel[axis], stride[axis], dilation[axis])[at[:, None], at]
    check(*mask_of(TILES, select, OFF), expected)


@pytest.mark.parametrize(("radius", "frames"), [(2.5, 0), (6, 1), (5, 4)])
def test_disk(radius: float, frames: int) -> None:
    f, y, x = (np.abs(PLACES[:, axis, None] - PLACES[:, axis]) for axis in range(3))
    check(
        *mask_of(TILES, {"kind": "disk", "radius": radius, "frames": frames}, OFF),
        (y**2 + x**2 < radius**2) & (f <= frames),
    )


@pytest.mark.parametrize("kernel", [(1, 3, 3), (2, 2, 5)])
def test_neighborhood_of_tiles(kernel: Cell) -> None:
    """The tiles are 4 x 4 x 4 here: 2 x 5 x 6 of them."""
    select = {"kind": "neighborhood", "kernel": kernel, "per": "tile"}
    tile = PLACES // 4
    expected = np.ones((CELLS, CELLS), bool)
    for axis, count in enumerate((2, 5, 6)):
        at = tile[:, axis]
        expected &= seen(count, kernel[axis], 1, 1)[at[:, None], at]
    check(*mask_of(TILES, select, OFF), expected)


def test_radial() -> None:
    """Radial Attention in blocks of 64: a plane of 391 gives bands of 512, halved at each doubling of distance."""
    plane, decay = 17 * 23, 0.3
    units = units_of("fhw whole")
    kept = np.eye(len(units), dtype=bool)
    spans = [range(0, plane, UNIT)[i % 7] for i in range(len(units))]
    for (i, a), (j, b) in itertools.product(enumerate(units), repeat=2):
        apart = abs(a[0][0] - b[0][0])
        wide = 512 / 2 ** apart.bit_length()
        width = {0: plane, 1: plane // 2}.get(apart, max(wide * decay, UNIT))
        if wide < UNIT and apart % int(UNIT / wide):
            continue
        rows = spans[i] + np.arange(len(a))
        columns = spans[j] + np.arange(len(b))
        share = (np.abs(rows[:, None] - columns) <= width).mean(0)
        kept[i, j] |= (share > 1 / 3).sum() > 0.6 * max((share > 0).sum(), 1e-9)
    select = {"kind": "radial", "decay": decay}
    mask, _ = mask_of({"kind": "axes", "axes": "fhw", "whole": True}, select, {"own": True})
    assert 0.3 < kept.mean() < 0.9
    assert torch.equal(mask, spelled_out(kept, units))


@pytest.mark.parametrize("order", ["raster", "hilbert", "wfh"])
def test_band(order: str) -> None:
    """All pairs of units up to the distance of middles at which the pairs are nearest to the asked share."""
    units = units_of(order)
    sizes = [len(unit) for unit in units]
    middle = [sum(sizes[:i]) + sizes[i] / 2 for i in range(len(sizes))]
    apart = np.array([[abs(a - b) for b in middle] for a in middle])
    density = 0.4
    share = (density * LAYOUT.length**2 - (LAYOUT.length**2 - CELLS**2)) / CELLS**2
    options = {d: apart <= d for d in set(apart.flatten())}
    cost = np.outer(sizes, sizes)
    best = min(options.values(), key=lambda taken: abs((taken * cost).sum() / CELLS**2 - share))
    kind = {"kind": order} if order != "wfh" else {"kind": "axes", "axes": "wfh"}
    mask, _ = mask_of(kind, {"kind": "band", "density": density}, {"own": True})
    assert torch.equal(mask, spelled_out(best, units))


def test_columns_are_the_same_for_all_queries_and_evenly_spaced() -> None:
    units = units_of("raster")
    mask, density = mask_of({"kind": "raster"}, {"kind": "columns", "density": 0.3}, OFF)
    grid = mask[7 : 7 + CELLS, 7 : 7 + CELLS]
    assert (grid == grid[0]).all()
    taken = [i for i in range(len(units)) if grid[0, UNIT * i]]
    gaps = np.diff(taken)
    assert gaps.max() - gaps.min() <= 1
    assert density == pytest.approx(0.3, rel=0.15)


@pytest.mark.parametrize("order", ["raster", "hilbert", "tile"])
def test_adjacent(order: str) -> None:
    units = units_of(order)
    grown = [
        {(f + a, h + b, w + c) for f, h, w in unit for a, b, c in itertools.product((-1, 0, 1), repeat=3)}
        for unit in units
    ]
    kept = np.array([[bool(grown[i] & set(unit)) for unit in units] for i in range(len(units))])
    settled = {"kind": "top-k", "density": 1e-6}
    kind = {"kind": order, **({"video": (4, 8, 8)} if order == "tile" else {})}
    plan, *_ = planned(
        {"order": kind, "score": {"kind": "geometry"}, "select": settled, "keeps": {"own": False, "adjacent": True}},
        heads=1,
    )
    assert torch.equal(plan.to_mask()[0, 0], spelled_out(kept, units))


def step_lengths(grid: Cell) -> np.ndarray:
    """Walk the curve, check that it visits every cell, and return how many cells away each step goes."""
    path = np.stack(np.unravel_index(curves.gilbert(grid), grid), -1)
    assert len({tuple(cell) for cell in path.tolist()}) == len(path) == math.prod(grid)
    return np.abs(np.diff(path, axis=0)).sum(1)


@pytest.mark.parametrize("grid", [(4, 16, 24), (8, 8, 8), (2, 6, 40), (1, 17, 23)])
def test_gilbert_steps_to_neighbours_on_even_boxes_and_in_pictures(grid: Cell) -> None:
    assert (step_lengths(grid) > 1).sum() <= (1 if grid[0] == 1 else 0)


def test_gilbert_on_an_odd_video() -> None:
    steps = step_lengths(GRID)
    assert (steps > 1).mean() < 0.03
    assert steps.max() <= 4
    path = np.stack(np.unravel_index(curves.gilbert(GRID), GRID), -1)
    mask, _ = mask_of({"kind": "gilbert"}, {"kind": "band", "density": 0.1}, {"own": True})
    runs = [[(int(f), int(h), int(w)) for f, h, w in path[i : i + UNIT]] for i in range(0, CELLS, UNIT)]
    owner = {cell: number for number, run in enumerate(runs) for cell in run}
    number = torch.tensor([owner[cell] for cell in raster_cells()])
    for a, b in itertools.product(range(len(runs)), repeat=2):
        block = mask[7 : 7 + CELLS, 7 : 7 + CELLS][number == a][:, number == b]
        assert bool(block.all()) == bool(block.any()), "a unit is a run of the curve"
