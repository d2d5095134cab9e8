"""Recipes that choose by place alone, against slow restatements of their papers' rules, token by token."""

from __future__ import annotations

import json
import math
import random
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from restate import boxes, cell, expect, made, on_grid

from dit_accel.config import RadialSelect, Recipe
from dit_accel.layout import Grid, Text, TokenLayout
from dit_accel.sparsity import shapes
from dit_accel.sparsity.adjacency import adjacent
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16}
TILES = {"picture": (1, 4, 4), "video": (2, 4, 4), **SMALL}
PICTURE = TokenLayout(grid=(1, 13, 11), text=5)
VIDEO = TokenLayout(grid=(5, 6, 7), text=3, text_first=False)
LAYOUTS = [PICTURE, VIDEO, TokenLayout(grid=(3, 8, 8))]
DATA = Path(__file__).parent / "data"
NATTEN = json.loads((DATA / "natten_windows.json").read_text())["masks"]
AXES = ("extent", "kernel", "stride", "dilation")  # of a window, each an axis long
Gold = dict[str, Any]


def named(gold: Gold) -> str:
    return "-".join("x".join(map(str, gold[name])) for name in AXES)


def strings(mask: np.ndarray) -> list[str]:
    return ["".join("01"[int(seen)] for seen in row) for row in mask]


@pytest.mark.parametrize("gold", NATTEN, ids=named)
def test_windows_are_those_of_natten(gold: Gold) -> None:
    """The masks in the file were printed by the natten package itself (`data/make_natten.py`)."""
    extent, *sizes = (gold[name] for name in AXES)
    cells = np.unravel_index(np.arange(np.prod(extent)), extent)
    ours = np.ones((len(cells[0]), len(cells[0])), dtype=bool)
    for at, *axis in zip(cells, extent, *sizes, strict=True):
        first, last, number = shapes.window(*axis)
        ours &= (first[at][:, None] <= number[at]) & (number[at] <= last[at][:, None])
    assert strings(ours) == gold["rows"]


@pytest.mark.parametrize("gold", [gold for gold in NATTEN if len(gold["extent"]) > 1], ids=named)
def test_gna_computes_what_natten_does(gold: Gold) -> None:
    """The recipe as a whole, on pictures and videos whose sides are no multiples of its tiles."""
    grid, kernel, stride, dilation = ((1,) * (3 - len(gold[name])) + tuple(gold[name]) for name in AXES)
    recipe = resolve("gna", kernel=kernel, stride=stride, dilation=dilation, **TILES)
    _, plan, *_ = made(recipe, TokenLayout(grid=grid))
    assert strings(plan.to_mask()[0, 0].numpy()) == gold["rows"]


def test_the_natten_package_itself_still_prints_these_masks() -> None:
    """Runs where natten is installed; and on windows that nobody picked."""
    pytest.importorskip("natten")
    print_rows = runpy.run_path(str(DATA / "make_natten.py"))["rows"]
    for gold in NATTEN:
        assert print_rows(*(gold[name] for name in AXES)) == gold["rows"]
    make = random.Random(0)
    for _ in range(20):
        dilation = [make.randint(1, 3) for _ in range(make.randint(1, 3))]
        kernel = [make.randint(2, 4) for _ in dilation]
        extent = [k * d + make.randint(0, 3) for k, d in zip(kernel, dilation, strict=True)]
        stride = [make.randint(1, k) for k in kernel]
        case = dict(zip(AXES, (extent, kernel, stride, dilation), strict=True))
        print(case)
        test_windows_are_those_of_natten({**case, "rows": print_rows(*case.values())})


def seen_on_axis(i: int, j: int, length: int, kernel: int, stride: int, dilation: int) -> bool:
    """Say whether key j lies in query i's window: of all windows in its residue's line, the one best centred."""
    if i % dilation != j % dilation:
        return False
    line = [x for x in range(length) if x % dilation == i % dilation]
    kernel = max(min(kernel, length // dilation), 1)
    at = line.index(i)
    leader = min(at // stride * stride + stride // 2, len(line) - 1)
    start = min(range(len(line) - kernel + 1), key=lambda s: abs(s + kernel // 2 - leader))
    return j in line[start : start + kernel]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        ((3, 5, 5), (1, 1, 1), (1, 1, 1)),
        ((2, 4, 6), (2, 4, 4), (1, 1, 1)),
        ((1, 3, 2), (1, 2, 1), (1, 2, 3)),
        ((9, 9, 9), (1, 3, 5), (1, 1, 1)),
    ],
)
def test_gna(layout: TokenLayout, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    recipe = resolve("gna", kernel=kernel, stride=stride, dilation=dilation, **TILES)
    _, plan, *_ = made(recipe, layout)

    def rule(i: int, j: int) -> bool:
        a, b = cell(layout, i), cell(layout, j)
        assert a is not None
        assert b is not None
        sizes = zip(layout.main.shape, kernel, stride, dilation, strict=True)
        return all(seen_on_axis(x, y, *size) for x, y, size in zip(a, b, sizes, strict=True))

    mask = plan.to_mask()
    expect(mask[0, 0], layout, rule)
    assert float(plan.density()) == pytest.approx(float(mask.float().mean()), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("radius", "frames"), [(2, 0), (3.5, 1), (4, 4), (1, 2)])
def test_clear(layout: TokenLayout, radius: float, frames: int) -> None:
    """CLEAR: tokens with dx² + dy² < radius²; on video, so many frames to either side."""
    _, plan, *_ = made(resolve("clear", radius=radius, frames=frames, **TILES), layout)

    def rule(i: int, j: int) -> bool:
        (f, y, x), (g, v, u) = cell(layout, i), cell(layout, j)  # type: ignore[misc]
        return (y - v) ** 2 + (x - u) ** 2 < radius**2 and abs(f - g) <= frames

    mask = plan.to_mask()
    expect(mask[0, 0], layout, rule)
    assert float(plan.density()) == pytest.approx(float(mask.float().mean()), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 1), (3, 3, 3)])
def test_sta(layout: TokenLayout, kernel: tuple[int, ...]) -> None:
    """Sliding Tile Attention: tiles around the tile, the middle clamped so that the window stays inside."""
    tile = (1, 4, 4) if layout.main.frames == 1 else (2, 4, 4)
    _, plan, *_ = made(resolve("sta", kernel=kernel, **TILES), layout)
    expect(plan.to_mask()[0, 0], layout, lambda i, j: in_window_of_tiles(layout, tile, kernel, i, j))


def in_window_of_tiles(layout: TokenLayout, tile: tuple[int, ...], kernel: tuple[int, ...], i: int, j: int) -> bool:
    """Say whether token j's tile lies in the window of token i's, whose middle is clamped."""
    a, b = cell(layout, i), cell(layout, j)
    assert a is not None
    assert b is not None
    for axis, extent in enumerate(layout.main.shape):
        count = math.ceil(extent / tile[axis])
        size = min(kernel[axis], count)
        low, high = size // 2, count - 1 - (size - 1) // 2
        middle = min(max(a[axis] // tile[axis], low), high)
        if not middle - size // 2 <= b[axis] // tile[axis] <= middle + (size - 1) // 2:
            return False
    return True


@pytest.mark.parametrize(
    ("layout", "along", "density"),
    [(PICTURE, "h", 0.5), (PICTURE, "w", 0.5), (PICTURE, "fw", 0.7), (VIDEO, "fh", 0.6), (LAYOUTS[2], "hw", 0.3)],
    ids=str,
)
def test_sta_windows_that_span_axes_whole(layout: TokenLayout, along: str, density: float) -> None:
    """Everything on the named axes; on the one that is left, of all windows the one nearest to the density."""
    tile = (1, 4, 4) if layout.main.frames == 1 else (2, 4, 4)
    _, plan, *_ = made(resolve("sta", density=density, **TILES).override(along=along), layout)
    counts = [math.ceil(n / t) for n, t in zip(layout.main.shape, tile, strict=True)]
    (free,) = [axis for axis in range(3) if "fhw"[axis] not in along and counts[axis] > 1]
    grid = on_grid(layout)
    shares = {}
    for size in range(1, counts[free] + 1):
        kernel = tuple(size if axis == free else counts[axis] for axis in range(3))
        held = sum(in_window_of_tiles(layout, tile, kernel, i, j) for i in grid for j in grid)
        shares[kernel] = 1 - (len(grid) ** 2 - held) / layout.length**2
    best = min(shares, key=lambda kernel: abs(shares[kernel] - density))
    expect(plan.to_mask()[0, 0], layout, lambda i, j: in_window_of_tiles(layout, tile, best, i, j))


@pytest.mark.parametrize("name", ["sta", "gna", "clear", "delta", "svg1", "moa", "duo", "sparse-vdit"])
def test_text_above_the_density_leaves_the_least_and_not_everything(name: str) -> None:
    """Where text alone is more than was asked, rules of places keep their smallest shape."""
    layout = TokenLayout(grid=(1, 12, 12), text=144)
    _, plan, *_ = made(resolve(name, density=0.3, dense_steps=0, **SMALL), layout)
    assert float(plan.density()) < 0.9


@pytest.mark.parametrize("layout", [TokenLayout(grid=(6, 6, 8), text=5), TokenLayout(grid=(9, 5, 9))], ids=str)
@pytest.mark.parametrize("decay", [0.25, 0.95])
def test_radial(layout: TokenLayout, decay: float) -> None:
    """Radial Attention: bands between frames, spelled out, then shrunk to blocks of 16 as the authors do."""
    _, plan, *_ = made(resolve("radial", decay=decay, **SMALL), layout)
    frames, plane = layout.main.frames, layout.main.height * layout.main.width
    start = next(s for s, g in layout.spans() if isinstance(g, Grid))
    kept = set()
    for f in range(frames):
        for g in range(frames):
            apart = abs(f - g)
            length = 2 ** plane.bit_length() / 2 ** apart.bit_length()
            width = {0: plane, 1: plane // 2}.get(apart, max(length * decay, 16))
            band = np.abs(np.arange(plane)[:, None] - np.arange(plane)) <= width
            if length < 16 and apart % int(16 / length):
                band &= False
            for r in range(0, plane, 16):
                for c in range(0, plane, 16):
                    columns = band[r : r + 16, c : c + 16].mean(0)
                    if (columns > 1 / 3).sum() > 0.6 * max((columns > 0).sum(), 1e-9):
                        kept.add((f, r // 16, g, c // 16))
    for f in range(frames):
        kept |= {(f, r, f, r) for r in range(math.ceil(plane / 16))}  # a row's own block

    def rule(i: int, j: int) -> bool:
        (f, r), (g, c) = divmod(i - start, plane), divmod(j - start, plane)
        return (f, r // 16, g, c // 16) in kept

    expect(plan.to_mask()[0, 0], layout, rule)


def test_radial_decays_with_distance_and_meets_a_density() -> None:
    layout = TokenLayout(grid=(16, 8, 12))
    tiles = tiling_for(resolve("radial", **SMALL), layout)
    tokens = shapes.sizes(tiles)
    by_frame = shapes.unit_mask(tiles, RadialSelect(decay=0.5), None).reshape(16, 6, 16, 6).mean((1, 3))
    near, far = (np.mean([by_frame[i, i + d] for i in range(16 - d)]) for d in (1, 9))
    assert near > 2 * far
    for share in (0.45, 0.6):
        mask = shapes.unit_mask(tiles, RadialSelect(density=share), share)
        assert shapes.share_of(mask, tokens) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ["tile", "hilbert", "gilbert"])
def test_adjacent_units(layout: TokenLayout, order: str) -> None:
    """Jenga's neighbours: units with tokens that differ by at most one on every axis."""
    sizes = {"picture": (1, 4, 4), "video": (2, 4, 4)} if order == "tile" else {}
    tiles = tiling_for(resolve("jenga", order={"kind": order, **sizes}, **SMALL), layout)
    groups = [[t for t in row if t >= 0] for row in tiles.slots.reshape(tiles.units, -1).tolist()]
    touching = adjacent(tiles)
    for a, queries in enumerate(groups):
        for b, keys in enumerate(groups):
            places = [(cell(layout, i), cell(layout, j)) for i in queries for j in keys]
            close = any(p and q and max(abs(x - y) for x, y in zip(p, q, strict=True)) <= 1 for p, q in places)
            assert bool(touching[a, b]) == close


@pytest.mark.parametrize("name", ["gna", "clear", "sta", "radial"])
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_a_density_finds_the_size(name: str, density: float) -> None:
    changes = TILES if resolve(name).order.kind == "tile" else SMALL
    for layout in (TokenLayout(grid=(1, 31, 33), text=6), TokenLayout(grid=(7, 12, 13))):
        _, plan, *_ = made(resolve(name, density=density, **changes), layout)
        assert float(plan.density()) == pytest.approx(density, rel=0.2), plan.note


def test_references_lie_over_the_picture() -> None:
    """A query sees the keys of a reference around its own place, scaled."""
    layout = TokenLayout([Text(3), Grid(1, 8, 8), Grid(1, 16, 16, role="reference")])
    _, plan, *_ = made(resolve("gna", kernel=(1, 3, 3), stride=(1, 1, 1), **TILES), layout)
    mask = plan.to_mask()[0, 0]
    seen = mask[3 + 4 * 8 + 4, 3 + 64 :].view(16, 16)
    assert seen[6:12, 6:12].all()
    assert int(seen.sum()) == 36
    assert float(plan.density()) == pytest.approx(float(mask.float().mean()), rel=1e-6)


def test_a_size_that_does_not_exist_is_said() -> None:
    layout = TokenLayout(grid=(16, 8, 12))
    _, plan, *_ = made(resolve("radial", density=0.2, **SMALL), layout)
    assert "the nearest size that 'radial' has on this grid takes" in plan.note


@pytest.mark.parametrize("name", ["gna", "clear", "sta", "radial"])
def test_places_do_not_look_at_content(name: str) -> None:
    changes = TILES if resolve(name).order.kind == "tile" else SMALL
    recipe: Recipe = resolve(name, density=0.3, **changes)
    (_, a, *_), (_, b, *_) = (made(recipe, PICTURE, seed) for seed in (0, 1))
    assert bool((a.to_mask() == b.to_mask()).all())
    assert len(boxes(PICTURE, (1, 4, 4))) == 12
    assert len(on_grid(PICTURE)) == 143
