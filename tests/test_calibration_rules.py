"""What a calibration finds against slow restatements of the papers' rules, on calls of random models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from restate import band, boxes, by_axes, cut, on_grid, patterns, spelled, weights
from test_calibration import SMALL, TILES, tiled

from dit_accel.calibration import Calibration
from dit_accel.calibration.choose import choose, spend
from dit_accel.calibration.seen import cut as cut_run
from dit_accel.call import AttentionCall
from dit_accel.config import HeadChoice, Option, Profile
from dit_accel.config.select import AllSelect, BandSelect, NoneSelect
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import shapes
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.recipes import resolve
from dit_accel.sparsity.tiling import tiling


# The rules, restated ------------------------------------------------------------------------------------------------
@dataclass
class Look:
    """One attention call of a stock run: its run, step's share of the run, site, and what was attended."""

    run: int
    share: float
    site: str
    call: AttentionCall

    def exact(self, b: int, h: int) -> torch.Tensor:
        return weights(self.call.q[b, :, h], self.call.k[b, :, h])


def watched(family: str, recipe: Any, runs: int = 1, steps: int = 2, **asked: Any) -> tuple[Profile, list[Look]]:
    """Calibrate a tiny random pipeline, guidance on, and return all calls that it made."""
    pipe, call = {"flux": tiny.flux, "wan": tiny.wan}[family]()
    guidance = {"flux": {"negative_prompt": "a dog", "true_cfg_scale": 3.0}, "wan": {"guidance_scale": 3.0}}[family]
    size = {"flux": {"height": 26, "width": 18}, "wan": {"height": 96, "width": 64}}[family]
    looks: list[Look] = []
    sharpen(pipe)
    with Calibration(pipe, recipe, **asked) as calibration:
        calibration.handle.watchers += (
            lambda c, plan, out: looks.append(Look(c.step.run, c.step.index / steps, c.site.name, c)),
        )
        for seed in range(runs):
            tiny.generate(pipe, {**call, **guidance, **size}, steps=steps, seed=seed)
        return calibration.profile(), looks


def sharpen(pipe: Any) -> None:
    """Make random heads attend to some tokens more than to others."""
    for module in pipe.transformer.modules():
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norm = getattr(module, name, None)
            if norm is not None and getattr(norm, "weight", None) is not None:
                norm.weight.data.mul_(2.5)


Mask = Callable[[TokenLayout, torch.Tensor], list[torch.Tensor]]


def of_svg1(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    return [spelled(layout, *pattern) for pattern in patterns(layout, grid_share(layout, 0.4))]


VDIT = (0.2, 0.45, 0.8)  # densities far apart, so that the price matters


def of_vdit(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    """Nothing, the spatial and the temporal band, evenly spaced columns."""
    raster = cut(on_grid(layout), 16)
    n = len(raster)
    spatial, temporal, share = (grid_share(layout, density) for density in VDIT)
    count = min(max(round(share * n), 1), n)
    columns = {(r, (i * n + n // 2) // count) for r in range(n) for i in range(count)}
    bands = [spelled(layout, *patterns(layout, spatial)[0]), spelled(layout, *patterns(layout, temporal)[1])]
    return [spelled(layout, raster, set()), *bands, spelled(layout, raster, columns)]


def of_moa(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    raster = cut(on_grid(layout), 16)
    return [spelled(layout, raster, band(raster, grid_share(layout, d))) for d in (0.1, 0.2, 0.35, 0.5, 0.75)]


def of_duo(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    return [of_moa(layout, exact)[0], torch.ones(layout.length, layout.length, dtype=torch.bool)]


def of_paro(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    return by_axes(layout, exact, grid_share(layout, 0.4))


def of_sta(layout: TokenLayout, exact: torch.Tensor) -> list[torch.Tensor]:
    """Windows of tiles that span some axes whole: the rest of the axes as near to the density as they get."""
    search = resolve("sta", **TILES, search=tiled(0.5)).search
    assert search is not None
    tile = (1, 4, 4) if layout.main.frames == 1 else (1, 2, 4)
    groups = boxes(layout, tile)
    cut_ = tiling(layout, search.options[0].order, 16, 16)  # pyright: ignore[reportArgumentType]
    masks = []
    for option in search.options:
        if isinstance(option.select, AllSelect):
            masks.append(torch.ones(layout.length, layout.length, dtype=torch.bool))
            continue
        units = shapes.unit_mask(cut_, option.select, grid_share(layout, option.select.asked or 1))
        masks.append(spelled(layout, groups, {(int(r), int(c)) for r, c in zip(*units.nonzero(), strict=True)}))
    return masks


def lost(look: Look, masks_of: Mask, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What each head loses by each pattern on all grid queries, and its share of pairs, [patterns, heads]."""
    call = look.call
    grid = on_grid(call.layout)
    losses, costs = [], []
    for h in range(call.q.shape[2]):
        sums, kept = [], []
        for b in range(len(call.q)):
            exact, v = look.exact(b, h), call.v[b, :, h].double()
            masks = masks_of(call.layout, exact)
            true = exact @ v
            for mask in masks:
                held = exact * mask
                if loss == "mass":
                    sums.append(1 - float(held.sum(-1)[grid].mean()))
                else:
                    out = held @ v / held.sum(-1, keepdim=True).clamp(min=1e-30)
                    sums.append(float((out - true)[grid].square().sum() / true[grid].square().sum()))
                kept.append(float(mask.float().mean()))
        losses.append(torch.tensor(sums).view(len(call.q), -1).mean(0))
        costs.append(torch.tensor(kept).view(len(call.q), -1).mean(0))
    return torch.stack(losses, 1), torch.stack(costs, 1)


def by_site(looks: list[Look], masks_of: Mask, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over calls, the heads of all sites after each other, [patterns, heads] each."""
    sites = list(dict.fromkeys(look.site for look in looks))
    per_site = []
    for site in sites:
        seen = [lost(look, masks_of, loss) for look in looks if look.site == site]
        per_site.append([torch.stack(values).mean(0) for values in zip(*seen, strict=True)])
    losses, costs = (torch.cat(values, 1) for values in zip(*per_site, strict=True))
    return losses, costs


def numbers(profile: Profile, window: int = 0) -> list[int]:
    assert profile.options is not None
    return [number for windows in profile.options.values() for number in windows[window] or ()]


@pytest.mark.parametrize(
    ("name", "masks_of", "loss", "density"),
    [("svg1", of_svg1, "output", 0.4), ("paro", of_paro, "mass", 0.4)],
)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_the_pattern_that_loses_least(name: str, masks_of: Mask, loss: str, density: float, family: str) -> None:
    """SVG1 by the output's error, PARO by the attention held; mean over steps, branches and runs."""
    profile, looks = watched(family, resolve(name, density=density, **SMALL), runs=2)
    losses, _ = by_site(looks, masks_of, loss)
    expect_best(losses, numbers(profile))


def expect_best(scores: torch.Tensor, got: list[int]) -> None:
    """Check that each head has the least score, but for the noise of float32."""
    for head, number in enumerate(got):
        assert float(scores[number, head]) <= float(scores[:, head].min()) * (1 + 1e-4) + 1e-7, (head, scores[:, head])
    assert len(got) == scores.shape[1]


@pytest.mark.parametrize(("price", "limit"), [(0.5, 1.0), (2.0, 1.0), (0.5, 0.05)])
def test_sparse_vdit_by_price(price: float, limit: float) -> None:
    """L = normalised MSE + price x density; all patterns over the limit: everything; of four heads none may skip."""
    base = resolve("sparse-vdit", **SMALL)
    assert base.heads is not None
    nothing, *sparse = base.heads.options[1:]
    options = [
        option.model_copy(update={"select": option.select.model_copy(update={"density": density})})
        for option, density in zip(sparse, VDIT, strict=True)
    ]
    heads = base.heads.model_copy(update={"price": price, "limit": limit, "options": (nothing, *options)})
    profile, looks = watched("wan", base.override(heads=heads.model_dump()))
    losses, costs = by_site(looks, of_vdit, "output")
    got = numbers(profile)
    unsure = [head for head in range(4) if float(losses[:, head].min()) > limit]
    assert [head for head, number in enumerate(got) if number == 4] == unsure
    score = losses + price * costs
    score[0] = math.inf  # nothing: 3 % of four heads are none
    score[:, unsure] = 0
    expect_best(score, [0 if number == 4 else number for number in got])
    assert unsure or limit == 1.0


@pytest.mark.parametrize(
    ("name", "masks_of", "budget"),
    [("duo", of_duo, 0.6), ("moa", of_moa, 0.45), ("moa", of_moa, 0.6), ("sta", of_sta, 0.5)],
)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_budget_over_the_heads_of_all_sites(name: str, masks_of: Mask, budget: float, family: str) -> None:
    """From the cheapest patterns on, always what saves most per pair and fits; or one pattern for all, if better."""
    changes = {"search": tiled(0.5), **TILES} if name == "sta" else {"sinks": 0}
    recipe = resolve(name, **SMALL, **changes).override(density=budget)
    profile, looks = watched(family, recipe, windows=1)
    losses, costs = by_site(looks, masks_of, "output")
    heads = losses.shape[1]
    now = [min(range(len(losses)), key=lambda i: (float(costs[i, h]), float(losses[i, h]))) for h in range(heads)]
    left = budget * heads - sum(float(costs[i, h]) for h, i in enumerate(now))
    ended = set[int]()
    while len(ended) < heads:
        steps = {}
        for h in set(range(heads)) - ended:
            better = [i for i in range(len(losses)) if losses[i, h] < losses[now[h], h] - 1e-12]
            if better:
                saved = {
                    i: float((losses[now[h], h] - losses[i, h]) / (costs[i, h] - costs[now[h], h]).clamp(min=1e-12))
                    for i in better
                }
                steps[h] = max(better, key=lambda i: saved[i]), max(saved.values())
            else:
                ended.add(h)
        if not steps:
            break
        h = max(steps, key=lambda head: steps[head][1])
        cost = float(costs[steps[h][0], h] - costs[now[h], h])
        if cost > left + 1e-9:
            ended.add(h)
        else:
            now[h], left = steps[h][0], left - cost
    got = numbers(profile)
    spent = sum(float(costs[i, h]) for h, i in enumerate(got))
    assert spent <= budget * heads + 1e-6
    alike = [[i] * heads for i in range(len(losses)) if float(costs[i].sum()) <= budget * heads + 1e-9]
    ours, *others = (sum(float(losses[i, h]) for h, i in enumerate(chosen)) for chosen in (got, now, *alike))
    theirs = min(others)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6), (got, now)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_floors_are_the_largest_of_any_prompt(family: str) -> None:
    """Fewest keys that hold 95 % of a query's attention to the grid; mean over queries, largest run; by window."""
    profile, looks = watched(family, resolve("svg2", **SMALL), runs=2, steps=3, windows=2)
    assert profile.windows == (0.0, 0.5)
    assert profile.floors is not None
    for site, windows in profile.floors.items():
        for heads, (start, end) in zip(windows, ((0, 0.5), (0.5, 1)), strict=True):
            runs = []
            for number in (1, 2):
                seen = [x for x in looks if (x.site, x.run) == (site, number) and start <= x.share < end]
                steps = {x.share: [y for y in seen if y.share == x.share] for x in seen}
                runs.append([np.mean([np.mean([needed(x, h) for x in xs]) for xs in steps.values()]) for h in range(2)])
            assert heads == pytest.approx(np.max(runs, 0).tolist(), abs=2e-3)
            assert np.ptp(runs, 0).max() > 2e-3  # the runs differ, so that their mean would be seen


def needed(look: Look, head: int) -> float:
    """The share of the grid's keys that hold 95 % of what its queries give to the grid."""
    grid = on_grid(look.call.layout)
    counts = []
    for b in range(len(look.call.q)):
        for row in look.exact(b, head)[grid][:, grid]:
            mass, taken = 0.0, 0
            for share in sorted((row / row.sum()).tolist(), reverse=True):
                if mass >= 0.95:
                    break
                mass, taken = mass + share, taken + 1
            counts.append(taken / len(grid))
    return sum(counts) / len(counts)


# Choosing, on numbers -----------------------------------------------------------------------------------------------
BANDS = tuple(Option(select=BandSelect(density=d)) for d in (0.1, 0.3, 0.6))


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_room_loses_less_by_more_than_one_step(seed: int) -> None:
    """Against all choices of five heads: the greedy one is the best for what it has spent on the hull, and fits."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(0.05, 1, (4, 5)), 0)
    losses = np.sort(rng.uniform(0, 1, (4, 5)), 0)[::-1]
    room = float(rng.uniform(costs[0].sum(), costs[-1].sum()))
    best = spend(losses, costs, room)
    spent, lost_ = (float(x[best, range(5)].sum()) for x in (costs, losses))
    assert spent <= room + 1e-9
    others = [
        (sum(costs[i, h] for h, i in enumerate(pick)), sum(losses[i, h] for h, i in enumerate(pick)))
        for pick in itertools.product(range(4), repeat=5)
    ]
    step = float((losses[0] - losses[-1]).max())
    assert lost_ - min(loss for cost, loss in others if cost <= room) <= step
    assert lost_ == pytest.approx(min(loss for cost, loss in others if cost <= spent + 1e-9), abs=step / 2)


def test_what_is_not_finite_or_over_the_limit_is_computed() -> None:
    choice = HeadChoice(options=BANDS, limit=0.5)
    losses = np.array([[0.4, 0.9, np.nan, 0.1], [0.2, 0.8, 0.1, 0.3], [0.1, 0.7, 0.1, np.inf]])
    costs = np.broadcast_to([[0.1], [0.3], [0.6]], losses.shape)
    assert choose(choice, losses, costs).tolist() == [2, 3, 3, 3]
    priced = choice.model_copy(update={"price": 1.0})
    assert choose(priced, losses, costs).tolist() == [0, 3, 3, 3]
    budget = choice.model_copy(update={"budget": 0.8})  # 3.2 pairs, of which three heads take 3
    assert choose(budget, losses, costs).tolist() == [0, 3, 3, 3]


def test_a_head_that_may_not_be_left_out_computes() -> None:
    nothing = HeadChoice(options=(Option(select=NoneSelect()),))
    assert choose(nothing, np.zeros((1, 40)), np.zeros((1, 40))).tolist() == [0, *[1] * 39]


@pytest.mark.parametrize(
    ("shares", "count", "first", "expected"),
    [
        ([0.2, 0.4, 0.6, 0.8], 4, 0.2, (0.0, 0.4, 0.6, 0.8)),
        ([0.5, 0.75], 4, 0.2, (0.0, 0.6)),
        ([0.0], 4, 0.0, (0.0,)),
        ([i / 50 for i in range(10, 50)], 2, 0.2, (0.0, 0.6)),
    ],
)
def test_windows_are_even_and_never_empty(
    shares: list[float], count: int, first: float, expected: tuple[float, ...]
) -> None:
    assert cut_run(shares, count, first) == expected
