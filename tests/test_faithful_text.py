"""What the papers do with text, against slow restatements: words ranked like a grid's tokens, or skipped by a head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import tiny
import torch
from restate import (
    band,
    boxes,
    called,
    cell,
    cut,
    expect_groups,
    fill,
    made,
    means,
    on_grid,
    samples,
    spelled,
    tensors,
    top_p,
    weights,
    with_tiles,
)
from test_faithful_content import along, stable
from test_faithful_llm import best_met, divergence, in_few_bits, pair, vertical_slash
from test_faithful_reuse import as_duo_divides, as_moa_divides, losses

import dit_accel
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.layout import Pad, Text, TokenLayout
from dit_accel.sparsity import rows
from dit_accel.sparsity.planner import MASKED, Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.sparsity.state import state_bytes

SMALL = {"block_q": 16, "block_k": 16, "faithful": True}
LAYOUTS = [TokenLayout(grid=(1, 13, 11), text=37), TokenLayout(grid=(5, 6, 7), text=21, text_first=False)]
RANKED = {name for name, recipe in dit_accel.recipes().items() if recipe.text == "ranked"}
CPU = torch.device("cpu")

each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def words(layout: TokenLayout) -> list[int]:
    return [t for t in range(layout.length) if cell(layout, t) is None]


def in_order(layout: TokenLayout, *parts: list[list[int]]) -> list[list[int]]:
    """Put the groups of words and of the grid in the order in which both stand in the sequence."""
    return [group for part in sorted(parts, key=lambda part: min(part[0])) for group in part]


def runs(layout: TokenLayout, curve: str) -> list[list[int]]:
    """Cut words as they stand, and the grid along a curve, into runs of 16."""
    return in_order(layout, cut(words(layout), 16), cut(along(layout, curve), 16))


def whole(groups: list[list[int]], chosen: set[tuple[int, int]], length: int) -> torch.Tensor:
    """The mask over tokens of chosen pairs of groups, and of nothing else."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for r, c in chosen:
        mask[pair(groups[r], groups[c])] = True
    return mask


def sampled(layout: TokenLayout, count: int) -> list[int]:
    return rows.sample(layout.with_text_ranked, count, CPU).tolist()


# Rows of units, best first -------------------------------------------------------------------------------------------
Worth = Callable[[torch.Tensor, torch.Tensor, list[list[int]]], torch.Tensor]


def largest(products: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.stack([products[pair(a, b)].max() for b in groups]) for a in groups])


def as_sparge(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    return means(q, groups) @ means(k - k.mean(0), groups).T


def as_double_sparsity(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    kept = (q.abs() * k.abs()).mean(0).argsort(descending=True)[:4]
    return largest(q[:, kept] @ k[:, kept].T, groups)


def as_hip(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    asking = [means(q, cut(group, 4)).double() for group in groups]
    return torch.tensor([[best_met(a, k[keys].double()) for keys in groups] for a in asking])


def as_sale(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """The largest estimated share of any pair; what a query's shares are of is its own unit."""
    mean_q, mean_k = q.mean(0), k.mean(0)
    products = in_few_bits(q - mean_q, 4) @ in_few_bits(k - mean_k, 4).T + (k - mean_k) @ mean_q
    products = products + (q @ mean_k)[:, None]
    own = whole(groups, {(g, g) for g in range(len(groups))}, len(q))
    return largest((products.double() / 4).exp() / ((q.double() @ k.double().T / 4).exp() * own).sum(-1, True), groups)


def as_tidal(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    exact = weights(q, k)
    return torch.stack([torch.stack([exact[pair(a, b)].sum(-1).mean() for b in groups]) for a in groups])


@each_layout
@pytest.mark.parametrize(
    ("name", "curve", "worth"),
    [
        ("sparge", "hilbert", as_sparge),
        ("double-sparsity", "gilbert", as_double_sparsity),
        ("hip", "hilbert", as_hip),
        ("sale", "hilbert", as_sale),
        ("tidal", "gilbert", as_tidal),
    ],
)
def test_top_k_of_words_and_grid(layout: TokenLayout, name: str, curve: str, worth: Worth) -> None:
    """Own unit first, then the units worth most, whether of words or of the grid, as many as the density allows."""
    _, plan, q, k, _ = made(resolve(name, density=0.4, **SMALL), layout, structured=True)
    groups = runs(layout, curve)
    sizes, dropped = [len(group) for group in groups], 0
    for b, h in samples(layout):
        score, chosen = worth(q[b, :, h], k[b, :, h], groups), set()
        for r in range(len(groups)):
            order = [r, *(c for c in stable(score[r]) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, 0.4 * layout.length)} | {(r, r)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)
        dropped += not plan.to_mask()[b, h][:, words(layout)].all()
    assert dropped


@each_layout
def test_xattention_of_words_and_grid(layout: TokenLayout) -> None:
    """Antidiagonal sums of 4 x 4 squares of the whole sequence; softmax; summed to blocks; top-p of each row."""
    _, plan, q, k, _ = made(resolve("xattention", p=0.5, stride=4, **SMALL), layout, structured=True)
    groups = runs(layout, "raster")
    short = [(g, run) for g, group in enumerate(groups) for run in cut(group, 4)]
    for b, h in samples(layout):

        def filled(x: torch.Tensor, run: list[int]) -> torch.Tensor:
            return torch.cat([x[run], x[run].mean(0).expand(4 - len(run), -1)])

        keys = torch.stack([filled(k[b, :, h], run).flatten() for _, run in short])
        backwards = torch.stack([filled(q[b, :, h], run).flip(0).flatten() for _, run in short])
        counted = torch.tensor([float(len(run)) for _, run in short])
        share = (backwards @ keys.T / 16 + counted.log()).softmax(-1) * counted[:, None]
        score = torch.zeros(len(groups), len(groups))
        for (i, (r, _)), (j, (c, _)) in itertools.product(enumerate(short), repeat=2):
            score[r, c] += share[i, j]
        chosen = {(r, c) for r in range(len(groups)) for c in top_p(score[r], 0.5) | {r}}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


# Keys sorted ---------------------------------------------------------------------------------------------------------
@each_layout
@pytest.mark.parametrize("name", ["pbs", "zipvl"])
def test_words_are_sorted_with_the_grid(layout: TokenLayout, name: str) -> None:
    """All keys by the attention of sampled queries; pbs pools and takes each row's top-p, zipvl one top-p for all."""
    count = 20
    changes = {"rows": count, "p": 0.6} if name == "pbs" else {"p": 0.6, "score": {"kind": "sampled", "rows": count}}
    changes = changes if name == "pbs" else {**changes, "order": {"kind": "importance", "rows": count}}
    _, plan, q, k, _ = made(resolve(name, **changes, **SMALL), layout, structured=True)
    queries, asked = runs(layout, "gilbert"), sampled(layout, count)
    line = [token for group in queries for token in group]
    for b, h in samples(layout):
        mass = weights(q[b, asked, h], k[b, :, h]).mean(0)
        keys = cut(sorted(line, key=lambda t: -float(mass[t])), 16)
        assert any(set(unit) & set(words(layout)) and set(unit) & set(on_grid(layout)) for unit in keys)
        score = (means(q[b, :, h], queries) @ means(k[b, :, h], keys).T / 4).softmax(-1)
        if name == "zipvl":
            score = torch.stack([mass[unit].sum() for unit in keys]).expand(len(queries), -1)
        chosen = {(r, c) for r in range(len(queries)) for c in top_p(score[r], 0.6)}
        expect_groups(plan.to_mask()[b, h], queries, keys, chosen)


# Lines ---------------------------------------------------------------------------------------------------------------
def tiled(layout: TokenLayout) -> tuple[list[list[int]], list[tuple[int, ...]], tuple[int, int, int]]:
    """Runs of words and tiles of the grid, with their places: words lie on an axis of their own."""
    tile = (1, 4, 4) if layout.main.frames == 1 else (2, 3, 2)
    groups = in_order(layout, cut(words(layout), 16), boxes(layout, tile))
    at: list[tuple[int, ...]] = []
    for group in groups:
        corner = cell(layout, group[0])
        said = words(layout)
        at.append((0, 0, 0, said.index(group[0]) // 16 + 1) if corner is None else (*_in(corner, tile), 0))
    return groups, at, tile


def _in(corner: tuple[int, int, int], tile: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(c // s for c, s in zip(corner, tile, strict=True))


@each_layout
@pytest.mark.parametrize("p", [0.5, 0.8])
def test_minference_of_words_and_grid(layout: TokenLayout, p: float) -> None:
    """Columns of words and tiles, and displacements of tiles, that hold most of the sampled rows' attention."""
    groups, at, tile = tiled(layout)
    recipe = resolve("minference", p=p, rows=128, picture=tile, video=tile, **SMALL)
    _, plan, q, k, _ = made(recipe, layout, structured=True)
    for b, h in samples(layout):
        chosen = vertical_slash(layout.with_text_ranked, q[b, :, h], k[b, :, h], groups, at, p)
        chosen |= {(r, r) for r in range(len(groups))}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


@each_layout
def test_flexprefill_of_words_and_grid(layout: TokenLayout) -> None:
    """Heads whose pooled score is near exact attention take its flat top-p, others columns and displacements."""
    groups, at, tile = tiled(layout)
    q, k, _ = tensors(layout, heads=3, structured=True)
    looked = {next(i for i, group in enumerate(groups) if t in group) for t in sampled(layout, 3)}
    sizes, n, pooled, apart = torch.tensor([len(g) for g in groups]).double(), len(groups), {}, {}
    for b, h in samples(layout, 3):
        mq, mk = means(q[b, :, h], groups).double(), means(k[b, :, h], groups).double()
        share = pooled[b, h] = (mq @ mk.T / 4 + sizes.log()).softmax(-1)
        exact = as_tidal(q[b, :, h], k[b, :, h], groups)
        apart[b, h] = max(divergence(exact[r], share[r]) for r in looked)
    trust = sum(sorted(apart.values())[2:4]) / 2  # so that three heads lie on either side of it
    base = with_tiles(resolve("flexprefill", **SMALL), tile, tile)
    assert base.heads is not None
    options = tuple({**o.model_dump(), "select": {**o.select.model_dump(), "p": 0.6}} for o in base.heads.options)
    heads = {**base.heads.model_dump(), "options": options, "rows": 48, "trust": trust}
    mask = made(base.override(heads=heads), layout, heads=3, structured=True)[1].to_mask()
    for (b, h), share in pooled.items():
        if apart[b, h] < trust:
            chosen = {divmod(i, n) for i in top_p(share.flatten(), 0.6)} | {(r, stable(share[r])[0]) for r in range(n)}
        else:
            chosen = vertical_slash(layout.with_text_ranked, q[b, :, h], k[b, :, h], groups, at, 0.6)
        expect_groups(mask[b, h], groups, groups, chosen | {(r, r) for r in range(n)})


# Bands ---------------------------------------------------------------------------------------------------------------
@each_layout
def test_delta_of_words_and_grid(layout: TokenLayout) -> None:
    """A band along the whole sequence; one query in 8 computed in full, the next ones moved by the same difference."""
    recipe = resolve("delta", density=0.3, stride=8, **SMALL)
    out, plan, q, k, v = made(recipe, layout, structured=True)
    plain, *_ = made(recipe.override(correct=None), layout, structured=True)
    groups = runs(layout, "raster")
    assert torch.equal(plan.to_mask()[0, 0], whole(groups, band(groups, 0.3), layout.length))
    for b, h in samples(layout):
        exact = weights(q[b, :, h], k[b, :, h]) @ v[b, :, h].double()
        for group in [group for run in groups for group in cut(run, 8)]:
            gold = plain[b, group, h].double() + exact[group[0]] - plain[b, group[0], h].double()
            torch.testing.assert_close(out[b, group, h].double(), gold, rtol=1e-4, atol=1e-5)


@each_layout
@pytest.mark.parametrize("name", ["duo", "moa"])
def test_bands_of_heads_run_along_words_and_grid(layout: TokenLayout, name: str) -> None:
    """Bands along the whole sequence and its first 16 tokens, divided among heads by what they lose on sampled rows."""
    _, plan, q, k, v = made(resolve(name, density=0.5, sinks=16, **SMALL), layout, heads=4, structured=True)
    groups = runs(layout, "raster")
    n, first = len(groups), {(r, c) for r in range(len(groups)) for c, group in enumerate(groups) if group[0] < 16}
    widths = {"duo": [0.1, 1.0], "moa": [0.1, 0.2, 0.35, 0.5, 0.75]}[name]
    every = set(itertools.product(range(n), repeat=2))
    chosen = [band(groups, width) if width < 1 else every for width in widths]
    masks = [whole(groups, pairs | first, layout.length) for pairs in chosen]
    costs = [float(mask.float().mean()) for mask in masks]
    divide = as_duo_divides if name == "duo" else as_moa_divides
    for b in range(2):
        lost = [losses(layout.with_text_ranked, q[b, :, h], k[b, :, h], v[b, :, h], masks) for h in range(4)]
        for h, i in enumerate(divide(lost, costs, 0.5)):
            assert torch.equal(plan.to_mask()[b, h], masks[i]), (h, i, lost)


# A head that is left out ---------------------------------------------------------------------------------------------
@each_layout
def test_a_head_that_sparse_vdit_leaves_out_computes_no_text_either(layout: TokenLayout) -> None:
    """At a high price no pattern is worth it: a head that skips the grid keeps text here, in the paper it does not."""
    found = {}
    for faithful in (False, True):
        base = resolve("sparse-vdit", **{**SMALL, "faithful": faithful})
        assert base.heads is not None
        heads = base.heads.model_copy(update={"price": 100.0, "limit": 5.0})
        out, plan, *_ = made(base.override(heads=heads.model_dump()), layout, structured=True)
        found[faithful] = out, plan.to_mask()
    grid = on_grid(layout)
    with_text = spelled(layout, [grid], set())
    assert torch.equal(found[False][1], with_text.expand_as(found[False][1]))
    assert found[False][0].abs().amin() > 0
    assert not found[True][1].any()
    assert not found[True][0].any()


# The switch itself ---------------------------------------------------------------------------------------------------
def test_every_recipe_whose_text_rule_differs_is_restated() -> None:
    restated = {"sparge", "double-sparsity", "hip", "sale", "tidal", "xattention", "pbs", "zipvl", "minference"}
    assert restated | {"flexprefill", "delta", "duo", "moa"} == RANKED
    assert {name for name, recipe in dit_accel.recipes().items() if recipe.text == "skipped"} == {"sparse-vdit"}
    assert not any(recipe.faithful for recipe in dit_accel.recipes().values())


def picked(recipe: Recipe, layout: TokenLayout) -> torch.Tensor:
    return made(recipe, layout, structured=True)[1].to_mask()


@pytest.mark.parametrize("name", sorted(RANKED))
def test_words_are_dropped_only_when_asked(name: str) -> None:
    layout, ours = LAYOUTS[1], {**SMALL, "faithful": False}
    kept, dropped = (picked(resolve(name, density=0.5, **changes), layout) for changes in (ours, SMALL))
    said = words(layout)
    assert kept[:, :, said].all()
    assert kept[..., said].all()
    assert not dropped[:, :, said].all()
    assert not dropped[..., said].all()
    assert dropped.any(-1).all()  # no row is empty


@pytest.mark.parametrize("name", ["grat", "draft", "svg2", "vmoba", "agent", "balanced"])
def test_where_the_paper_keeps_text_nothing_changes(name: str) -> None:
    layout, blocks = LAYOUTS[0], {"block_q": 16, "block_k": 16}
    if name == "balanced":
        blocks = {"block_q": 32, "block_k": 16, "key_run": 16}
    outs = [made(resolve(name, density=0.5, faithful=f, **blocks), layout, structured=True)[0] for f in (False, True)]
    assert torch.equal(*outs)


def test_words_are_asked_by_their_share() -> None:
    layout = TokenLayout([Text(30), Pad(2), TokenLayout(grid=(4, 16, 24)).main, Text(90)])
    found = sampled(layout, 64)
    assert found == sorted(set(found))
    first, last = ([t for t in found if start <= t < end] for start, end in ((0, 30), (1568, 1658)))
    assert (len(first), len(last)) == (round(64 * 30 / 1656), round(64 * 90 / 1656))
    assert not {30, 31} & set(found)
    assert max(b - a for a, b in itertools.pairwise(last)) < 2 * 90 / len(last)
    assert sampled(layout, 5000) == [t for t in range(1658) if t not in (30, 31)]
    assert sampled(TokenLayout(grid=(1, 2, 2), text=4000), 8)[-1] >= 4000  # the grid is always asked


def test_fillers_are_still_computed() -> None:
    layout = TokenLayout([Text(20), Pad(7), TokenLayout(grid=(1, 12, 12)).main])
    mask = picked(resolve("sparge", density=0.5, **SMALL), layout)
    assert mask[..., 20:27].all()
    assert mask[:, :, 20:27].all()
    assert not mask[..., :20].all()


def test_padded_text_is_kept_and_the_plan_says_so() -> None:
    layout = LAYOUTS[0]
    q, k, v = tensors(layout, structured=True)
    bias = torch.zeros(2, 1, layout.length)
    bias[1, :, 30:37] = -math.inf
    recipe = resolve("sparge", density=0.5, **SMALL)
    out, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, key_bias=bias, return_plan=True)
    ours = resolve("sparge", density=0.5, block_q=16, block_k=16)
    assert torch.equal(out, dit_accel.attention(q, k, v, layout=layout, recipe=ours, key_bias=bias))
    assert MASKED in plan.note


def test_a_kept_decision_is_that_of_the_same_words() -> None:
    layout, recipe = LAYOUTS[0], resolve("hip", density=0.4, every=3, dense_layers=0, **SMALL)
    planner = Planner(recipe)
    first = planner.plan(called(layout, *tensors(layout, 0, structured=True), step=4)).to_mask()
    assert planner.nbytes <= state_bytes(recipe, layout, 2, 2, 16)
    assert torch.equal(planner.plan(called(layout, *tensors(layout, 1, structured=True), step=5)).to_mask(), first)
    assert not torch.equal(planner.plan(called(layout, *tensors(layout, 1, structured=True), step=7)).to_mask(), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"select": {"kind": "within"}, "score": {"kind": "geometry"}},
        {"select": {"kind": "top-k"}, "score": {"kind": "geometry"}},
        {"order": {"kind": "axes", "whole": True}, "select": {"kind": "radial"}},
        {"cases": [{"layers": "0:1", "score": {"kind": "geometry"}}]},
    ],
)
def test_rules_of_places_refuse_to_rank_words(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="text 'ranked' needs rules that words have part in, not places on a grid"):
        resolve("sparge", faithful=True, **changes)
    assert resolve("sparge", **changes).text == "ranked"  # it is only carried out where it is asked for


def test_a_pipeline_runs_faithfully_and_says_so() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "sparge", density=0.5, faithful=True, dense_steps=0) as handle:
        drawn = tiny.generate(pipe, call, steps=2)
        report = handle.report()
    assert report.sparse_calls == report.calls
    assert "faithful: text is ranked and dropped like a grid's tokens" in report.notes
    with dit_accel.accelerate(pipe, "sparge", density=0.5, dense_steps=0):
        assert not torch.equal(torch.as_tensor(drawn), torch.as_tensor(tiny.generate(pipe, call, steps=2)))
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", faithful=True) as handle:
        tiny.generate(pipe, call, steps=2)
        assert "faithful: text is kept" in handle.report().notes
