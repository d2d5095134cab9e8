"""Plans of videos as pictures: a plan written down by hand, pixel by pixel, and any plan against its exact mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.errors import ConfigError, PlanError
from dit_accel.kernels.block_sparse import Predicate
from dit_accel.layout import Grid, Text, TokenLayout
from dit_accel.sparsity.draw import COMPUTED, GROUND, QUERY, SKIPPED, draw_frames, frame_density, key_maps
from dit_accel.sparsity.plan import Branch, Plan
from dit_accel.sparsity.recipes import resolve

# three frames of 4 x 8 tokens, two blocks of 16 (two rows each) a frame; block: the blocks it sees
KNOWN = {0: [0, 1], 1: [0, 1], 2: [0, 2], 3: [0, 3], 4: [5, 4, 1, 0, 2, 3], 5: [5]}
LAYOUT = TokenLayout(grid=(3, 4, 8))


def known(**more: Any) -> Plan:
    index = torch.full((1, 1, 6, 6), 99, dtype=torch.int32)  # what lies beyond the count must not matter
    for block, seen in KNOWN.items():
        index[0, 0, block, : len(seen)] = torch.tensor(seen, dtype=torch.int32)
    count = torch.tensor([[[len(seen) for seen in KNOWN.values()]]], dtype=torch.int32)
    return Plan(96, 96, (Branch(16, 16, index, count, **more),))


def test_key_maps_of_a_known_plan() -> None:
    maps = key_maps(known(), LAYOUT, (1, 3, 5))  # in block 3
    expected = np.zeros((3, 4, 8), bool)
    expected[0, :2] = True
    expected[1, 2:] = True
    assert np.array_equal(maps, expected)


def test_frame_density_of_a_known_plan() -> None:
    assert frame_density(known(), LAYOUT).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.75]]


def test_every_pixel_of_a_known_plan() -> None:
    page = np.asarray(draw_frames(known(), LAYOUT, (1, 3, 5), scale=2))
    expected = np.empty((16 + 24 + 4, 3 * 20 + 4, 3), np.uint8)
    expected[:] = GROUND
    frames = [[COMPUTED, COMPUTED, SKIPPED, SKIPPED], [SKIPPED, SKIPPED, COMPUTED, COMPUTED], [SKIPPED] * 4]
    for f, rows in enumerate(frames):
        for row, colour in enumerate(rows):
            expected[4 + 2 * row : 6 + 2 * row, 4 + 20 * f : 20 + 20 * f] = colour
    expected[10:12, 24 + 10 : 24 + 12] = QUERY
    for row, densities in enumerate([[255, 0, 0], [128, 128, 0], [128, 128, 191]]):
        for column, grey in enumerate(densities):
            expected[16 + 8 * row : 24 + 8 * row, 4 + 8 * column : 12 + 8 * column] = grey
    assert page.shape == expected.shape
    assert np.array_equal(page, expected)


def test_long_videos_wrap() -> None:
    layout = TokenLayout(grid=(17, 4, 4))
    page = draw_frames(Plan(272, 272), layout, (16, 0, 0), scale=1)
    assert page.size == (max(8 * 8 + 4, 17 * 4 + 8), 3 * 8 + 4 + 17 * 4 + 4)
    assert page.getpixel((4, 4 + 2 * 8)) == QUERY  # frame 16 begins the third row
    assert page.getpixel((12, 4 + 2 * 8)) == GROUND
    assert page.getpixel((4, 4)) == COMPUTED


def planned(layout: TokenLayout, name: str, seed: int = 0, **options: Any) -> Plan:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, layout.length, 2, 8, generator=g) for _ in range(3))
    recipe = resolve(name, density=0.4, block_q=32, block_k=16, **options)
    return dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)[1]


LAYOUTS = [
    TokenLayout([Text(5), Grid(5, 7, 9)]),
    TokenLayout([Grid(1, 4, 4, role="reference"), Grid(3, 9, 5), Text(2)]),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ["raster", "hilbert", "tile"])
@pytest.mark.parametrize("name", ["draft", "grat-x"])
def test_rows_maps_and_densities_are_those_of_the_mask(layout: TokenLayout, order: str, name: str) -> None:
    plan = planned(layout, name, order={"kind": order})
    start = next(start for start, segment in layout.spans() if segment is layout.main)
    frames, height, width = layout.main.shape
    full = plan.to_mask().expand(2, 2, -1, -1)
    for sample, head in ((0, 0), (1, 0), (1, 1)):
        mask = full[sample, head]
        some = torch.randperm(layout.length)[:20]
        assert torch.equal(plan.rows(some, sample, head), mask[some])
        grid = mask[start:, start:][: layout.main.length, : layout.main.length]
        cells = grid.reshape(*layout.main.shape, *layout.main.shape)
        for query in ((0, 0, 0), (frames - 1, height - 1, width - 1), (1, 3, 2)):
            assert np.array_equal(key_maps(plan, layout, query, sample, head), cells[query].numpy())
        means = cells.double().mean((1, 2, 4, 5))
        assert np.allclose(frame_density(plan, layout, sample, head), means.numpy())


def test_rows_of_two_branches_and_a_predicate() -> None:
    coords = torch.stack([torch.arange(96) // 32, torch.arange(96) % 32 // 8, torch.arange(96) % 8]).int()
    near = known(predicate=Predicate("box", (0, 1, 2), coords, coords))
    index = torch.zeros(1, 1, 6, 1, dtype=torch.int32)
    rest = Branch(16, 16, index, torch.tensor([[[0, 0, 0, 0, 0, 1]]], dtype=torch.int32))
    plan = Plan(96, 96, (*near.branches, rest))
    assert torch.equal(plan.rows(torch.arange(96)), plan.to_mask()[0, 0])
    assert plan.rows(torch.tensor([95]))[0, :16].all()


def test_dense_plan_sees_everything() -> None:
    plan = Plan(96, 96)
    assert key_maps(plan, LAYOUT, (0, 0, 0)).all()
    assert (frame_density(plan, LAYOUT) == 1).all()


@pytest.mark.parametrize(
    ("query", "more", "message"),
    [
        ((3, 0, 0), {}, r"the query \(3, 0, 0\) lies outside the grid of 3x4x8 tokens"),
        ((0, -1, 0), {}, "outside the grid"),
        ((0, 0, 0), {"sample": -1}, "number -1 was asked for"),
        ((0, 0, 0), {"layout": TokenLayout(grid=(3, 4, 9))}, "96 queries and 96 keys, the layout 3x4x9 has 108 tokens"),
    ],
)
def test_what_does_not_fit_is_said(query: tuple[int, int, int], more: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        draw_frames(known(), **{"layout": LAYOUT, "query": query, **more})


@pytest.mark.parametrize("query", [(1, 2), (0, 1, 2, 3), (0, 1.0, 2), None])
def test_a_query_is_three_whole_numbers(query: Any) -> None:
    with pytest.raises(ConfigError, match=r"query: expected \(frame, row, column\) as three whole numbers"):
        draw_frames(known(), LAYOUT, query)


def test_head_that_is_not_there_is_said() -> None:
    plan = planned(LAYOUTS[0], "draft")
    with pytest.raises(PlanError, match="it has 2 heads, number 2 was asked for"):
        draw_frames(plan, LAYOUTS[0], (0, 0, 0), head=2)
