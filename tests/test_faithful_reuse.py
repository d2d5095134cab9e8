"""Decisions that layers and steps share, and heads that divide a budget, against slow restatements."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from restate import band, called, cut, expect_groups, fill, made, on_grid, samples, spelled, tensors, weights
from test_faithful_content import along, stable
from test_faithful_llm import LAYOUTS, SMALL, pair

from dit_accel.layout import TokenLayout
from dit_accel.sparsity import rows
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo


# Decisions shared by layers, and heads that divide a budget ----------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tidal(layout: TokenLayout) -> None:
    """Two dense layers; layers 2 and 13 take the units of most exact attention, the others what these took."""
    recipe = resolve("tidal", density=0.4, dense_steps=0, **SMALL)
    planner = Planner(recipe)
    groups = cut(along(layout, "gilbert"), 16)
    sizes = [len(g) for g in groups]
    budget = grid_share(layout, 0.4) * sum(sizes)
    for step in range(2):
        expected: list[set[tuple[int, int]]] = []
        for layer in range(15):
            q, k, v = tensors(layout, seed=100 * step + layer, structured=True)
            here = called(layout, q, k, v, layer, step)
            if layer < 2:
                assert planner.dense_reason(here.site, here.step, layout, q.device) == "first 2 layers stay dense"
                continue
            assert planner.dense_reason(here.site, here.step, layout, q.device) == ""
            if layer in (2, 13):
                expected = []
                for b, h in samples(layout):
                    exact, chosen = weights(q[b, :, h], k[b, :, h]), set()
                    for r, group in enumerate(groups):
                        worth = torch.stack([exact[pair(group, keys)].sum(-1).mean() for keys in groups])
                        order = [r, *(c for c in stable(worth) if c != r)]
                        chosen |= {(r, c) for c in fill(order, sizes, budget)} | {(r, r)}
                    expected.append(chosen)
            mask = planner.plan(here).check().to_mask()
            for (b, h), chosen in zip(samples(layout), expected, strict=True):
                expect_groups(mask[b, h], groups, groups, chosen)


def kept_by_heads(layout: TokenLayout, densities: list[float], sinks: int) -> tuple[list[torch.Tensor], list[float]]:
    """The masks of bands of these widths along the tokens, with the first tokens' units, and what they cost."""
    runs = cut(on_grid(layout), 16)
    columns = {c for c, run in enumerate(runs) if run[0] - on_grid(layout)[0] < sinks}
    masks = []
    for density in densities:
        share = grid_share(layout, density)
        pairs = band(runs, share) if density < 1 else set(itertools.product(range(len(runs)), repeat=2))
        masks.append(spelled(layout, runs, pairs | {(r, c) for r in range(len(runs)) for c in columns}))
    return masks, [float(mask.float().mean()) for mask in masks]


def losses(
    layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: list[torch.Tensor]
) -> list[float]:
    """The output's squared error on sampled rows, over the output's square, of one head under each mask."""
    sampled = rows.sample(layout, 64, torch.device("cpu"))
    exact = weights(q[sampled], k)
    whole, out = exact @ v.double(), []
    for mask in masks:
        kept = exact * mask[sampled]
        wrong = kept @ v.double() / kept.sum(-1, keepdim=True) - whole
        out.append(float(wrong.square().sum() / whole.square().sum()))
    return out


def as_duo_divides(lost: list[list[float]], costs: list[float], budget: float) -> list[int]:
    """Which of two masks each head takes: those that lose most by the first take the second, within the budget."""
    heads = len(lost)
    whole = min(range(heads + 1), key=lambda n: (abs(n * costs[1] + (heads - n) * costs[0] - heads * budget), n))
    everything = sorted(range(heads), key=lambda h: -lost[h][0])[:whole]
    return [int(h in everything) for h in range(heads)]


def as_moa_divides(lost: list[list[float]], costs: list[float], budget: float) -> tuple[int, ...]:
    """Which mask each head takes: of all ways that a price of width leads to, the one nearest to the budget."""
    widths = range(len(costs))
    turns = sorted(  # a head's choice changes only at prices where two of its widths cost alike
        (a[i] - a[j]) / (costs[j] - costs[i])
        for a in lost
        for i, j in itertools.permutations(widths, 2)
        if costs[i] < costs[j] and a[i] > a[j]
    )
    prices = [0.0, *(math.sqrt(x * y) for x, y in itertools.pairwise(turns)), 2 * turns[-1]]
    ways = {tuple(min(widths, key=lambda i: a[i] + price * costs[i]) for a in lost) for price in prices}
    return min(ways, key=lambda way: abs(sum(costs[i] for i in way) / len(way) - budget))


@pytest.mark.parametrize("layout", [LAYOUTS[1], TokenLayout(grid=(1, 16, 20))], ids=str)
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_duo(layout: TokenLayout, budget: float) -> None:
    """Heads are local, with the first tokens, until the budget lets those that lose most by it see everything."""
    _, plan, q, k, v = made(resolve("duo", density=budget, **SMALL), layout, heads=5, structured=True)
    masks, costs = kept_by_heads(layout, [0.1, 1.0], sinks=16)
    for b in range(2):
        lost = [losses(layout, q[b, :, h], k[b, :, h], v[b, :, h], masks) for h in range(5)]
        for h, i in enumerate(as_duo_divides(lost, costs, budget)):
            assert torch.equal(plan.to_mask()[b, h], masks[i]), (h, i, lost)


@pytest.mark.parametrize("layout", [LAYOUTS[1], TokenLayout(grid=(1, 16, 20))], ids=str)
@pytest.mark.parametrize("budget", [0.5, 0.35])
def test_moa(layout: TokenLayout, budget: float) -> None:
    """Each head has one of five widths: of all ways that a price of width leads to, the one nearest to the budget."""
    recipe = resolve("moa", density=budget, sinks=16, **SMALL)
    _, plan, q, k, v = made(recipe, layout, heads=4, structured=True)
    masks, costs = kept_by_heads(layout, [0.1, 0.2, 0.35, 0.5, 0.75], sinks=16)
    for b in range(2):
        lost = [losses(layout, q[b, :, h], k[b, :, h], v[b, :, h], masks) for h in range(4)]
        for h, i in enumerate(as_moa_divides(lost, costs, budget)):
            assert torch.equal(plan.to_mask()[b, h], masks[i]), (h, i, lost)


# Exact sums with kept log-sum-exps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adaspa_reuses_the_log_sum_exps_of_its_first_search(layout: TokenLayout) -> None:
    """Search at two steps: exact block sums at the first, sums over the first one's denominators at the second."""
    recipe = resolve("adaspa", density=0.4, dense_steps=0, spread=False, **SMALL)
    planner = Planner(recipe)
    groups = cut(along(layout, "raster"), 16)
    sizes = [len(g) for g in groups]
    budget = grid_share(layout, 0.4) * sum(sizes)
    whole: dict[tuple[int, int], torch.Tensor] = {}
    moved = 0
    for step in (2, 4, 6, 9):
        q, k, v = tensors(layout, seed=step, structured=True)
        mask = planner.plan(called(layout, q, k, v, 0, step)).check().to_mask()
        if step in (2, 6):
            found = {}
            for b, h in samples(layout):
                exps = (q[b, :, h].double() @ k[b, :, h].double().T / 4).exp()
                fresh = exps.sum(-1, keepdim=True)
                share = exps / whole.setdefault((b, h), fresh)
                chosen, other = set(), set()
                for r, group in enumerate(groups):
                    for taken, map_ in ((chosen, share), (other, exps / fresh)):
                        worth = torch.stack([map_[pair(group, keys)].sum(-1).mean() for keys in groups])
                        order = [r, *(c for c in stable(worth) if c != r)]
                        taken |= {(r, c) for c in fill(order, sizes, budget)} | {(r, r)}
                found[b, h] = chosen
                moved += chosen != other
        for (b, h), chosen in found.items():
            expect_groups(mask[b, h], groups, groups, chosen)
    assert moved > 0
    again = Planner(recipe)
    again.plan(called(layout, *tensors(layout, seed=2, structured=True), 0, 2))
    next_run = replace(called(layout, *tensors(layout, seed=6, structured=True)), step=StepInfo(2, 6, 10, "cond"))
    assert torch.equal(again.plan(next_run).to_mask(), Planner(recipe).plan(next_run).to_mask())


def test_log_sum_exps_of_another_order_are_not_used() -> None:
    """A case that lays the tokens out otherwise starts anew."""
    layout = LAYOUTS[2]
    turned = {"name": "turned", "base": "adaspa", "cases": [{"steps": [0.5, 1.0], "order": {"kind": "hilbert"}}]}
    planner, fresh = (Planner(resolve(turned, density=0.4, dense_steps=0, **SMALL)) for _ in range(2))
    planner.plan(called(layout, *tensors(layout, seed=1, structured=True), 0, 2))
    later = called(layout, *tensors(layout, seed=2, structured=True), 0, 6)
    assert torch.equal(planner.plan(later).to_mask(), fresh.plan(later).to_mask())
