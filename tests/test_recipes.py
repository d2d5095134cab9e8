"""The recipes against slow, obvious restatements of their papers' rules, token by token."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from restate import tensors, with_tiles

import dit_accel
from dit_accel.config import Recipe
from dit_accel.layout import Grid, TokenLayout
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.expected import budget_density
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16}


def planned(
    recipe: Recipe, layout: TokenLayout, seed: int = 0, heads: int = 2
) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, layout.length, heads, 16, generator=g) for _ in range(3))
    state = dit_accel.AttentionState()
    _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state, return_plan=True)
    if plan.measures:  # a full step first: what follows is the recipe
        _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state, return_plan=True)
    return plan, q, k


def small(name: str, density: float) -> Recipe:
    """Return a recipe with blocks and tiles that fit the test's grids."""
    return with_tiles(resolve(name, density=density, **SMALL), (1, 4, 4), (2, 4, 4))


def cell(layout: TokenLayout, token: int) -> tuple[int, int, int] | None:
    """Return the grid coordinates of a token, None for text."""
    for start, segment in layout.spans():
        if isinstance(segment, Grid) and start <= token < start + segment.length:
            f, rest = divmod(token - start, segment.height * segment.width)
            return (f, *divmod(rest, segment.width))
    return None


LAYOUTS = [
    TokenLayout(grid=(1, 13, 11), text=5),
    TokenLayout(grid=(1, 12, 16), text=9, text_first=False),
    TokenLayout(grid=(5, 7, 9), text=3),
    TokenLayout(grid=(3, 8, 8)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "radius"), [("grat-b", 1), ("grat-b", 2), ("grat-x", 0)])
def test_grat_keeps_the_groups_its_paper_names(layout: TokenLayout, name: str, radius: int) -> None:
    """GRAT-B: groups within the radius on every axis. GRAT-X: groups in the same row or column (plane)."""
    tile = (1, 4, 4) if layout.main.frames == 1 else (2, 4, 4)
    plan, *_ = planned(resolve(name, radius=radius, picture=(1, 4, 4), video=(2, 4, 4), **SMALL), layout)
    mask = plan.check().to_mask()
    assert mask.shape[:2] == (1, 1)
    axes = [a for a in range(3) if layout.main.shape[a] > 1]
    for i in range(layout.length):
        for j in range(layout.length):
            a, b = cell(layout, i), cell(layout, j)
            if a is None or b is None:
                expected = True
            else:
                apart = [abs(a[x] // tile[x] - b[x] // tile[x]) for x in range(3)]
                expected = max(apart) <= radius if name == "grat-b" else min(apart[x] for x in axes) <= radius
            assert bool(mask[0, 0, i, j]) == expected, (i, j, a, b)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_draft_keeps_the_percentile_its_paper_names(layout: TokenLayout, density: float) -> None:
    """DraftAttention: softmax of pooled logits per head, the largest entries over all rows until the share is full.

    On its paper's lattice, whose tiles divide every grid there.
    """
    recipe = resolve("draft", density=density, picture=(1, 4, 4), video=(1, 4, 4), packed=False, **SMALL)
    plan, q, k = planned(recipe, layout)
    mask = plan.check().to_mask()
    groups: dict[tuple[int, ...], list[int]] = {}
    for token in range(layout.length):
        at = cell(layout, token)
        if at is not None:
            groups.setdefault((at[0], at[1] // 4, at[2] // 4), []).append(token)
    tiles = list(groups.values())
    sizes = [len(t) for t in tiles]
    share = grid_share(layout, density)
    for b in range(2):
        for h in range(2):
            pooled_q = torch.stack([q[b, t, h].mean(0) for t in tiles])
            pooled_k = torch.stack([k[b, t, h].mean(0) for t in tiles])
            draft = (pooled_q @ pooled_k.T / math.sqrt(16)).softmax(-1)
            entries = sorted(
                ((r, c) for r in range(len(tiles)) for c in range(len(tiles))),
                key=lambda rc: (rc[0] != rc[1], -float(draft[rc])),
            )
            chosen, spent, budget = set(), 0, share * sum(sizes) ** 2
            for r, c in entries:
                spent += sizes[r] * sizes[c]
                if spent - sizes[r] * sizes[c] / 2 <= budget:
                    chosen.add((r, c))
            for r in range(len(tiles)):
                chosen.add((r, r))
                for c in range(len(tiles)):
                    got = mask[b, h][torch.tensor(tiles[r])[:, None], torch.tensor(tiles[c])[None]]
                    assert bool(got.all()) == bool(got.any()) == ((r, c) in chosen)


MASKED = [name for name, recipe in dit_accel.recipes().items() if recipe.select.kind != "agents"]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_is_never_dropped(name: str, layout: TokenLayout) -> None:
    mask = planned(small(name, 0.3), layout)[0].to_mask()
    text = torch.tensor([cell(layout, t) is None for t in range(layout.length)])
    assert mask[..., text, :].all()
    assert mask[..., :, text].all()


@pytest.mark.parametrize("name", [name for name in MASKED if dit_accel.recipes()[name].total is None])
@pytest.mark.parametrize("density", [0.5, 0.3])
def test_reported_density_is_the_asked_one(name: str, density: float) -> None:
    layout = TokenLayout(grid=(1, 40, 40), text=16)
    plan, *_ = planned(small(name, density), layout)
    exact = plan.to_mask().float().mean()
    assert float(plan.density()) == pytest.approx(float(exact), rel=1e-6)
    assert float(plan.density()) == pytest.approx(density, rel=0.2) or "2 heads with patterns" in plan.note


VIDEO = TokenLayout(grid=(6, 9, 11), text=5)
BY_PLACE = {"grat-b", "grat-x", "gna", "clear", "sta", "radial", "delta", "rettention"}
METHODS = [name for name, recipe in dit_accel.recipes().items() if not recipe.adaptive]


def masks_and_output(name: str, seed: int, structured: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run a recipe, one that measures what is missing a second time to use it."""
    recipe = with_tiles(resolve(name, density=0.4, block_q=32, block_k=32), (1, 4, 8), (2, 4, 4))
    if recipe.order.kind == "kmeans":
        recipe = recipe.override(first=2)
    state, (q, k, v) = dit_accel.AttentionState(), tensors(VIDEO, seed, 2, structured)
    out, plan = dit_accel.attention(q, k, v, layout=VIDEO, recipe=recipe, state=state, return_plan=True)
    if plan.measures:
        out, plan = dit_accel.attention(q, k, v, layout=VIDEO, recipe=recipe, state=state, return_plan=True)
    return None if plan.operator else plan.to_mask(), out


@pytest.mark.parametrize("name", [name for name in METHODS if name in MASKED])
def test_what_chooses_by_content_follows_it_and_what_chooses_by_place_does_not(name: str) -> None:
    first = masks_and_output(name, 0, structured=False)[0]
    assert first is not None
    seeds = (1,) if name in BY_PLACE else range(1, 9)  # heads may take the same of few patterns by chance
    others = (masks_and_output(name, seed, structured=seed % 2 == 1)[0] for seed in seeds)
    assert all(other is not None and torch.equal(first, other) for other in others) == (name in BY_PLACE)


def test_any_two_recipes_differ() -> None:
    """In their masks, or else in what they make of them; `auto` is made of the others and may be one of them."""
    names = [name for name in METHODS if name != "auto"]
    found = {name: masks_and_output(name, 0, structured=True) for name in names}
    for a, b in itertools.combinations(names, 2):
        (mask_a, out_a), (mask_b, out_b) = found[a], found[b]
        same = mask_a is not None and mask_b is not None and torch.equal(*torch.broadcast_tensors(mask_a, mask_b))
        assert not (same and torch.allclose(out_a, out_b, atol=1e-4)), (a, b)


CHOSEN = json.loads((Path(dit_accel.__file__).parent / "sparsity" / "auto.json").read_text())["recipes"]


@pytest.mark.parametrize("mixture", CHOSEN, ids=lambda mixture: str(mixture["total"]))
def test_auto_is_what_its_file_says(mixture: dict[str, Any]) -> None:
    """At each site and step the last case that holds, and each case the recipe whose name and density it bears."""
    auto, sites = resolve("auto", density=mixture["total"]), 12
    for site, step in itertools.product(range(sites), range(10)):
        here, at = auto.at(site, sites, step / 10), (site / sites, step / 10)
        said = mixture
        for case in mixture["cases"]:
            if all(low <= x < high for x, (low, high) in zip(at, (case["depth"], case["steps"]), strict=True)):
                said = {**mixture, **case}
        name, density = said["name"].split("@")
        one = resolve(name, density=float(density))
        for axis in ("order", "score", "select", "keeps", "correct"):
            chosen = getattr(here, axis)
            assert chosen == getattr(one, axis), (site, step, axis)
            assert (chosen and chosen.model_dump(mode="json", exclude_none=True)) == said.get(axis), (site, step, axis)


@pytest.mark.parametrize("name", ["grat-x", "draft"])
def test_unreachable_density_is_said_in_plain_words(name: str) -> None:
    layout = TokenLayout(grid=(1, 8, 8), text=64)
    plan, *_ = planned(resolve(name, density=0.3, picture=(1, 4, 4), **SMALL), layout)
    assert "the least here is 0.81: 64 text tokens beside 64 always take 0.75" in plan.note
    assert float(plan.density()) == pytest.approx(0.8125)


@pytest.mark.parametrize(("name", "density"), [("jenga", 0.3), ("svg2", 0.05)])
def test_a_floor_above_the_density_is_said_in_plain_words(name: str, density: float) -> None:
    layout = TokenLayout(grid=(7, 11, 13))
    plan, *_ = planned(resolve(name, density=density, **SMALL), layout)
    floor = resolve(name).model_dump()["select"]["least"]
    assert f"asked density {density}: each row takes at least {floor} of its units for their score" in plan.note
    assert float(plan.density()) > 1.2 * density
    assert planned(resolve(name, density=0.5, **SMALL), layout)[0].note == ""


@pytest.mark.parametrize("name", ["jenga", "rectified", "svg2", "svoo"])
@pytest.mark.parametrize("layout", [TokenLayout(grid=(1, 24, 24), text=24), TokenLayout(grid=(7, 11, 13))], ids=str)
def test_a_floor_is_in_what_is_expected_before_the_run(name: str, layout: TokenLayout) -> None:
    for density in (0.02, 0.5):
        recipe = small(name, density)
        plan, *_ = planned(recipe, layout)
        expected, spent = budget_density(recipe, layout), float(plan.density())
        assert expected is not None
        text = 1 - ((layout.length - layout.text) / layout.length) ** 2
        floor = recipe.model_dump()["select"]["least"] * (1 - text)
        assert expected >= max(density, text + floor) - 1e-9
        assert expected <= 1.1 * spent  # units at a border hold fewer tokens


@pytest.mark.parametrize("order", ["raster", "hilbert", "tile"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_order_gives_exact_attention_on_its_mask(order: str, layout: TokenLayout) -> None:
    recipe = resolve({"base": "draft", "name": order, "order": {"kind": order}, **SMALL}, density=0.5)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, layout.length, 2, 16, generator=g) for _ in range(3))
    out, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    weights = logits.masked_fill(~plan.to_mask(), -math.inf).softmax(-1)
    gold = torch.einsum("bhqk,bkhd->bqhd", weights, v.double())
    torch.testing.assert_close(out.double(), gold, rtol=1e-5, atol=1e-5)


def test_keeps_are_kept() -> None:
    layout = TokenLayout(grid=(3, 8, 8), text=2)
    small = {"picture": (1, 4, 4), "video": (1, 4, 4), **SMALL}
    mask = planned(resolve("draft", density=0.2, first_frame=True, **small), layout)[0].to_mask()
    assert mask[..., :, 2 : 2 + 64].all()
    mask = planned(resolve("draft", density=0.2, sinks=1, **small), layout)[0].to_mask()
    assert mask[..., :, 2:6].all()
    mask = planned(resolve("draft", density=0.2, own=True, **small), layout)[0].to_mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_undecidable_tokens_are_computed_in_full(bad: float) -> None:
    layout = TokenLayout(grid=(1, 16, 16))
    recipe = resolve("draft", density=0.2, picture=(1, 4, 4), **SMALL)
    q, k, v = (torch.randn(1, 256, 2, 16) for _ in range(3))
    q[0, 0, 0, 3] = bad  # head 0 only, first tile only
    _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)
    mask = plan.to_mask()
    assert mask[0, 0, 0].all()
    assert not mask[0, 1, 0].all()
    assert not mask[0, 0, 200].all()
