"""Recipes made for language models, against slow restatements of their papers' rules."""

from __future__ import annotations

import itertools
import math

import odd_video
import pytest
import torch
from restate import (
    block_of,
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

from dit_accel.layout import TokenLayout
from dit_accel.sparsity import rows
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16}
LAYOUTS = [
    TokenLayout(grid=(1, 13, 11), text=5),
    TokenLayout(grid=(5, 6, 7), text=3, text_first=False),
    TokenLayout(grid=(2, 8, 8)),
]
ODD = odd_video.LAYOUT


def blocks(layout: TokenLayout) -> dict[str, int]:
    return {"block_q": block_of(layout), "block_k": block_of(layout)}


def pair(rows: list[int], cols: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows)[:, None], torch.tensor(cols)


# HiP ---------------------------------------------------------------------------------------------------------------
def best_met(asking: torch.Tensor, keys: torch.Tensor) -> float:
    """Halve the keys, hold the middle key of one half against that of the other, go on in the winner's half."""
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    seen = [float((asking @ half[len(half) // 2]).max()) if len(half) else -math.inf for half in halves]
    winner = halves[0] if seen[0] > seen[1] else halves[1]
    return max(*seen, best_met(asking, winner) if len(winner) > 1 else -math.inf)


@pytest.mark.parametrize(("layout", "queries"), [*itertools.product(LAYOUTS, [1, 4]), (ODD, 4)], ids=str)
def test_hip(layout: TokenLayout, queries: int) -> None:
    """A key unit is worth the best product met on the way down its tree; top-k of each row."""
    _, plan, q, k, _ = made(resolve("hip", density=0.4, queries=queries, **blocks(layout)), layout, structured=True)
    groups = cut(along(layout, "hilbert"), block_of(layout))
    sizes = [len(g) for g in groups]
    budget, missed = grid_share(layout, 0.4) * sum(sizes), 0
    for b, h in samples(layout):
        chosen = set()
        for r, group in enumerate(groups):
            asking = means(q[b, :, h], cut(group, queries)).double()
            worth = torch.tensor([best_met(asking, k[b, keys, h].double()) for keys in groups])
            best = torch.stack([(asking @ k[b, keys, h].double().T).max() for keys in groups])
            missed += int((best > worth).sum())
            order = [r, *(c for c in stable(worth) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, budget)} | {(r, r)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)
    assert missed > 0  # else a tree would find what all keys would


def test_a_tree_finds_a_lone_strong_key_that_a_mean_hides() -> None:
    """Where neighbours are alike the descent ends at the strongest of them."""
    layout = TokenLayout(grid=(1, 1, 256))
    place = torch.arange(256.0)
    k = torch.zeros(1, 256, 1, 16)
    k[0, :, 0, 0] = 4 * (-((place - 101) ** 2) / 3).exp() - 1  # a peak in the seventh unit, none elsewhere
    k[0, 112:128, 0, 0] = 0.2  # the eighth is higher on average
    q = torch.zeros(1, 256, 1, 16)
    q[..., 0] = 3
    chosen = {}
    for score in ("tree", "pooled"):
        recipe = resolve("hip", density=1 / 16, score={"kind": score}, own=False, **SMALL)
        plan = Planner(recipe).plan(called(layout, q, k, k))
        chosen[score] = plan.to_mask()[0, 0, 0].nonzero().flatten().tolist()
    assert chosen == {"tree": list(range(96, 112)), "pooled": list(range(112, 128))}


# SALE --------------------------------------------------------------------------------------------------------------
def in_few_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    steps = {4: 7, 8: 127}[bits]
    return torch.stack([(token / token.abs().max() * steps).round() * token.abs().max() / steps for token in x])


def shares(layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, kept: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each token pair's attention: products in few bits over exact sums, on text and kept pairs only."""
    grid = on_grid(layout)
    mean_q, mean_k = q[grid].mean(0), k[grid].mean(0)
    products = in_few_bits(q - mean_q, bits) @ in_few_bits(k - mean_k, bits).T
    products = products + (k - mean_k) @ mean_q  # exact
    products = products + (q @ mean_k)[:, None]  # what taking the mean off the keys took off each row
    exact = (q.double() @ k.double().T / 4).exp()
    return (products.double() / 4).exp() / (exact * kept).sum(-1, keepdim=True)


def touching(layout: TokenLayout, groups: list[list[int]]) -> set[tuple[int, int]]:
    """List the pairs of units that have tokens at most one apart on every axis."""
    places = [torch.tensor([cell(layout, token) or () for token in group]) for group in groups]
    pairs = itertools.product(enumerate(places), repeat=2)
    return {(r, c) for (r, a), (c, b) in pairs if ((a[:, None] - b).abs().amax(-1) <= 1).any()}


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(ODD, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize(("bits", "above", "adjacent"), [(4, 0.2, False), (8, 0.05, True)])
def test_sale(layout: TokenLayout, bits: int, above: float, adjacent: bool) -> None:
    """All unit pairs in which a query gives a key more than a share of its attention, as estimated in few bits."""
    recipe = resolve("sale", above=above, bits=bits, adjacent=adjacent, **blocks(layout))
    _, plan, q, k, _ = made(recipe, layout, structured=True)
    groups = cut(along(layout, "hilbert"), block_of(layout))
    taken = []
    for b, h in samples(layout):
        kept = spelled(layout, groups, touching(layout, groups) if adjacent else {(r, r) for r in range(len(groups))})
        share = shares(layout, q[b, :, h], k[b, :, h], kept, bits)
        chosen = set()
        for r, c in itertools.product(range(len(groups)), repeat=2):
            at = pair(groups[r], groups[c])
            if kept[at].all() or share[at].max() > above:
                chosen.add((r, c))
        taken.append(len(chosen) / len(groups) ** 2)
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)
    assert min(taken) < 1


@pytest.mark.parametrize("layout", [*LAYOUTS, ODD], ids=str)
def test_sale_of_a_density(layout: TokenLayout) -> None:
    """Asked for a density: the pairs of largest estimated share in each row."""
    _, plan, q, k, _ = made(resolve("sale", density=0.4, **blocks(layout)), layout, structured=True)
    groups = cut(along(layout, "hilbert"), block_of(layout))
    n, sizes = len(groups), [len(g) for g in groups]
    kept = spelled(layout, groups, {(r, r) for r in range(n)})
    for b, h in samples(layout):
        share = shares(layout, q[b, :, h], k[b, :, h], kept, 4)
        chosen = set()
        for r, group in enumerate(groups):
            worth = torch.stack([share[pair(group, keys)].max() for keys in groups])
            order = [r, *(c for c in stable(worth) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, grid_share(layout, 0.4) * sum(sizes))} | {(r, r)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


# FlexPrefill -------------------------------------------------------------------------------------------------------
def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the square root of the Jensen-Shannon divergence of two lists of shares, in natural logarithms."""
    middle = (a + b) / 2
    total = 0.0
    for share in (a, b):
        total += sum(float(s * (s / m).log()) for s, m in zip(share, middle, strict=True) if s > 0) / 2
    return math.sqrt(max(total, 0.0))


@pytest.mark.parametrize(("layout", "p"), [*itertools.product(LAYOUTS, [0.5, 0.7]), (ODD, 0.7)], ids=str)
def test_flexprefill(layout: TokenLayout, p: float) -> None:
    """Heads whose pooled score is near exact attention take its flat top-p, others columns and displacements."""
    trust = 0.0265  # here some heads lie on either side of it
    tile = {16: (1, 4, 4) if layout.main.frames == 1 else (2, 3, 2), 64: (4, 4, 4)}[block_of(layout)]
    base = with_tiles(resolve("flexprefill", **blocks(layout)), tile, tile)
    assert base.heads is not None
    trusted, doubted = base.heads.options
    options = tuple({**o.model_dump(), "select": {**o.select.model_dump(), "p": p}} for o in (trusted, doubted))
    heads = {**base.heads.model_dump(), "options": options, "rows": 48, "trust": trust}
    _, plan, q, k, _ = made(base.override(heads=heads), layout, heads=3, structured=True)
    groups = boxes(layout, tile)
    grid, n, cpu = on_grid(layout), len(groups), torch.device("cpu")
    sampled = rows.sample(layout, max(48 // block_of(layout), 2), cpu).tolist()
    looked = {next(i for i, g in enumerate(groups) if t in g) for t in sampled}
    corners = [cell(layout, group[0]) or (0, 0, 0) for group in groups]
    at = [tuple(c // s for c, s in zip(corner, tile, strict=True)) for corner in corners]
    sizes = torch.tensor([len(g) for g in groups]).double()
    answers = set()
    for b, h in samples(layout, 3):
        mq, mk = means(q[b, :, h], groups).double(), means(k[b, :, h], groups).double()
        pooled = (mq @ mk.T / 4 + sizes.log()).softmax(-1)
        apart = []
        for unit in looked:
            exact = weights(q[b, groups[unit], h], k[b, grid, h])  # text takes no part
            place = {t: i for i, t in enumerate(grid)}
            sums = torch.stack([exact[:, [place[t] for t in g]].sum(-1).mean() for g in groups])
            apart.append(divergence(sums, pooled[unit]))
        answers.add(max(apart) < trust)
        if max(apart) < trust:
            chosen = {divmod(i, n) for i in top_p(pooled.flatten(), p)}
            chosen |= {(r, stable(pooled[r])[0]) for r in range(n)}
        else:
            chosen = vertical_slash(layout, q[b, :, h], k[b, :, h], groups, at, p)
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen | {(r, r) for r in range(n)})
    assert answers == {True, False}


def vertical_slash(
    layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, groups: list[list[int]], at: list[tuple[int, ...]], p: float
) -> set[tuple[int, int]]:
    """The fewest tiles and the fewest displacements of tiles that each hold p of the sampled rows' attention."""
    n, sampled = len(groups), rows.sample(layout, 128, torch.device("cpu")).tolist()
    apart = {(r, c): tuple(b - a for a, b in zip(at[r], at[c], strict=True)) for r in range(n) for c in range(n)}
    moves = sorted(set(apart.values()))
    total, times, column = dict.fromkeys(moves, 0.0), dict.fromkeys(moves, 0), torch.zeros(n)
    exact = weights(q[sampled], k)
    for token, row in zip(sampled, exact, strict=True):
        r = next(i for i, group in enumerate(groups) if token in group)
        for c, group in enumerate(groups):
            held = float(row[group].sum())
            column[c] += held
            total[apart[r, c]] += held
            times[apart[r, c]] += 1
    queries = dict.fromkeys(moves, 0)
    for (r, _), move in apart.items():
        queries[move] += len(groups[r])
    held = torch.tensor([total[move] / max(times[move], 1) * queries[move] for move in moves])
    along = {moves[i] for i in top_p(held, p)}
    down = top_p(column, p)
    return {(r, c) for r in range(n) for c in range(n) if c in down or apart[r, c] in along}


def test_a_head_that_cannot_be_tested_computes_everything() -> None:
    layout = LAYOUTS[2]
    recipe = with_tiles(resolve("flexprefill", density=0.3, **SMALL), (1, 4, 4), (2, 4, 2))
    q, k, v = tensors(layout)
    k[0, :, 1] = float("nan")
    plan = Planner(recipe).plan(called(layout, q, k, v))
    assert plan.to_mask()[0, 1].all()
    assert not plan.to_mask()[0, 0].all()
    assert not plan.to_mask()[1, 1].all()
