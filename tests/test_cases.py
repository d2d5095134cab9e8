"""Layers and steps mapped to other choices, decisions shared by layers and made at given steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel import attend
from dit_accel.call import AttentionCall, Site
from dit_accel.config import Case, Recipe
from dit_accel.errors import ConfigError, PlanError
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

MIXED = Path(__file__).parent.parent / "examples" / "mixed_recipe.yaml"
LAYOUT = TokenLayout(grid=(1, 16, 16))
HEADS = {
    "options": [{"select": {"kind": "band", "density": 0.2}}, {"select": {"kind": "all"}}],
    "given": [1, 0],
}
SORTED = {"order": {"kind": "importance"}, "score": {"kind": "pooled"}, "select": {"kind": "top-k"}}
TILED = {"order": {"kind": "tile"}, "select": {"kind": "all"}}
CACHED = {"score": {"kind": "mass", "cached": True}, "select": {"kind": "top-k"}}
POOLED = {"score": {"kind": "pooled"}, "select": {"kind": "top-k"}}
RECIPE: Recipe = resolve("draft", density=0.3, picture=(1, 4, 4), block_q=16, block_k=16, dense_steps=0)


def call(at: int, seed: int, layer: int = 0, **changes: Any) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 256, 2, 16, generator=g) for _ in range(3))
    site = Site(f"layer.{layer}", "layer", layer, torch.nn.Identity(), 8)
    made = AttentionCall(site, StepInfo(1, at, 10, "cond"), LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v)
    return replace(made, **changes)


def mask(planner: Planner, attention: AttentionCall) -> torch.Tensor:
    return planner.plan(attention).check().to_mask()


def fresh(attention: AttentionCall) -> torch.Tensor:
    return mask(Planner(RECIPE), attention)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0:2", [0, 1]), ("-2:", [4, 5]), ("1::3", [1, 4]), (":", range(6)), ("4:99", [4, 5]), ("3:3", [])],
)
def test_layers_are_slices(layers: str, expected: list[int]) -> None:
    assert [site for site in range(6) if Case(layers=layers).holds(site, 6, 0.0)] == list(expected)


def test_steps_are_shares_of_the_run() -> None:
    case = Case(steps=(0.2, 0.6))
    assert [i for i in range(10) if case.holds(0, 1, i / 10)] == [2, 3, 4, 5]


def test_the_example_file_means_what_it_says() -> None:
    recipe = resolve(MIXED)
    assert recipe.at(0, 8, 0.0).select.kind == recipe.at(1, 8, 0.5).select.kind == "all"
    assert recipe.at(4, 8, 0.0).order.kind == "gilbert"
    assert recipe.at(3, 8, 0.0).order.kind == "hilbert"
    assert (recipe.at(3, 8, 0.5).density, recipe.at(3, 8, 0.6).density) == (0.25, 0.15)
    assert recipe.at(0, 8, 0.6).density == 0.15  # the later case wins
    asked = resolve(MIXED, density=0.4)
    assert [asked.at(site, 8, 0.5).density for site in (0, 3)] == [None, 0.4]
    assert asked.at(0, 8, 0.5).select.kind == "all"  # as the file says, whatever density is asked


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"layers": "first"}, "layers"),
        ({"layer": "0:2"}, "Did you mean 'layers'?"),
        ({"select": {"kind": "topk"}}, "Did you mean 'top-k'?"),
        ({"select": {"kind": "top-k", "densty": 0.2}}, "Did you mean 'density'?"),
        ({"steps": [0.5, 2]}, "less than or equal to 1"),
        ({"select": {"kind": "within"}}, "'within' measures distance"),
    ],
)
def test_bad_cases_are_named(case: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"base": "draft", "name": "a", "cases": [case]})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "gna", "own": True}, "keeps must all be off"),
        ({"base": "gna", "order": {"kind": "hilbert"}}, "needs order 'tile'"),
        ({"base": "gna", "order": {"kind": "tile", "packed": True}}, "can't be packed"),
        ({"base": "radial", "order": {"kind": "raster"}}, "frame by frame"),
        ({"base": "svg2", "score": {"kind": "subtiles"}}, "needs score 'pooled'"),
        ({"base": "svg2", "select": {"kind": "band"}}, "follows the content"),
        ({"base": "pbs", "first_frame": True}, "keeps has only 'own'"),
        ({"base": "draft", "select": {"kind": "none"}}, "an option of heads only"),
        ({"base": "dfs", "correct": {"kind": "pooled-mass"}}, "needs score 'pooled'"),
        ({"base": "svg1", "correct": {"kind": "centroids"}}, "can only be corrected by 'delta'"),
        ({"base": "draft", "correct": {"kind": "delts"}}, "Did you mean 'delta'?"),
        ({"base": "svg1", "heads": {"options": []}}, "at least 1 item"),
        ({"base": "svg1", "heads": {**HEADS, "given": [3]}}, "given names option 3"),
        ({"base": "svg1", "heads": {**HEADS, "givn": [0]}}, "Did you mean 'given'?"),
        ({"base": "svg2", "drift": 0.1}, "one order of places"),
        ({"base": "adaspa", "drift": 0.1}, "name one"),
        ({"base": "svg1", "heads": {"options": [TILED, {"select": {"kind": "band"}}]}}, "in the same tiles"),
        ({"base": "svg1", "heads": {"options": [SORTED]}}, "lies by place"),
        ({"base": "pbs", "score": {"kind": "mass"}}, "sorts keys head by head"),
        ({"base": "draft", "select": {"kind": "threshold"}}, "needs score 'low-bit'"),
        ({"base": "sale", "select": {"kind": "top-p"}}, "adds up shares"),
        ({"base": "agent", "own": True}, "keeps all off"),
        ({"base": "agent", "order": {"kind": "tile"}}, "order 'raster', keeps all off"),
        ({"base": "agent", "correct": {"kind": "delta"}}, "no pairs that a correction"),
        ({"base": "svg1", "heads": {"options": [{"select": {"kind": "agents"}}]}}, "and no heads"),
        ({"base": "svg1", "heads": {"options": [CACHED]}}, "cannot be cached"),
        ({"base": "svg1", "heads": {**HEADS, "trust": 0.1}}, "the first with score 'pooled'"),
        ({"base": "flexprefill", "heads": {"options": [POOLED, POOLED], "trust": 0.1, "limit": 1.0}}, "left out"),
        ({"base": "svg1", "search": HEADS}, "name one of them"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"name": "mine", **changes})
    assert message in str(error.value)


def test_heads_of_some_layers_mapped_by_number() -> None:
    """The second layer's first head sees everything and its second a band; the other layers follow the recipe."""
    mapped = {"base": "draft", "name": "mapped", "cases": [{"layers": "1:2", "heads": HEADS}]}
    recipe = resolve(mapped, density=0.3, picture=(1, 4, 4), block_q=16, block_k=16, dense_steps=0)
    planner = Planner(recipe)
    assert torch.equal(mask(planner, call(0, 0, 0)), fresh(call(0, 0)))
    here = mask(planner, call(0, 0, 1))
    assert here[0, 0].all()
    assert not here[0, 1].all()
    assert torch.equal(mask(planner, call(1, 9, 1)), here)


def test_a_number_for_each_head_is_needed() -> None:
    recipe = resolve({"name": "mapped", "heads": {**HEADS, "given": [1, 0, 0]}, "dense_steps": 0})
    with pytest.raises(PlanError, match="options for 3 heads, but the attention has 2"):
        mask(Planner(recipe), call(0, 0))


def test_cases_reach_the_calls() -> None:
    pipe, generation = tiny.flux()
    recipe = resolve(MIXED, dense_steps=0, block_q=16, block_k=16)
    with dit_accel.accelerate(pipe, recipe) as handle:
        tiny.generate(pipe, generation, steps=4)
    rows = handle.report().rows
    dense = [row for row in rows if row.reason == "the recipe computes every pair here"]
    assert {row.steps for row in dense} == {"0-2"}
    assert all(row.kind == "sparse" for row in rows if row.steps == "3")


def test_decisions_at_given_steps() -> None:
    planner = Planner(RECIPE.override(decide_at=(0.2, 0.6)))
    at_two = mask(planner, call(2, 2))
    for step in (3, 4, 5):
        assert torch.equal(mask(planner, call(step, step)), at_two)
    assert torch.equal(mask(planner, call(6, 6)), fresh(call(6, 6)))
    assert torch.equal(mask(planner, call(9, 9)), fresh(call(6, 6)))


def test_layers_take_over_the_last_deciding_one() -> None:
    planner = Planner(RECIPE.override(decide_layers=(1, 4)))
    masks = [mask(planner, call(0, layer, layer)) for layer in range(7)]
    expected = [fresh(call(0, decider)) for decider in (0, 1, 1, 1, 4, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    later = mask(planner, call(1, 50, 1))
    assert torch.equal(later, fresh(call(1, 50, 1)))


def test_two_transformers_share_no_decision() -> None:
    planner = Planner(RECIPE.override(decide_layers=(0,)))
    here = call(0, 0)
    there = replace(call(0, 1), site=replace(here.site, model="transformer_2."))
    assert torch.equal(mask(planner, here), fresh(here))
    assert torch.equal(mask(planner, there), fresh(there))


def two(at: int, seeds: tuple[int, int]) -> AttentionCall:
    """A batch of two samples, each from its own seed."""
    a, b = call(at, seeds[0]), call(at, seeds[1])
    return replace(a, **{name: torch.cat([getattr(a, name), getattr(b, name)]) for name in ("q", "k", "v")})


def test_drift_decides_again_for_the_sample_that_moved() -> None:
    planner = Planner(RECIPE.override(drift=0.3))
    first = mask(planner, two(0, (0, 1)))
    still = mask(planner, two(1, (0, 1)))
    assert torch.equal(still, first)
    moving = mask(planner, two(2, (0, 2)))  # the second sample has moved: measured here, acted on at the next call
    assert torch.equal(moving, first)
    after = mask(planner, two(3, (0, 2)))
    assert torch.equal(after[0], first[0])
    assert torch.equal(after[1], fresh(call(0, 2))[0])
    assert torch.equal(mask(planner, two(4, (0, 2))), after)


def test_a_sample_drifts_alone_as_in_a_batch() -> None:
    together, alone = (Planner(RECIPE.override(drift=0.3)) for _ in range(2))
    for at, (a, b) in enumerate([(0, 1), (0, 2), (0, 2), (3, 2), (3, 2)]):
        both = mask(together, two(at, (a, b)))
        assert torch.equal(both[1:], mask(alone, call(at, b)))


def test_drift_that_is_not_finite_decides_again() -> None:
    planner = Planner(RECIPE.override(drift=0.3))
    mask(planner, call(0, 0))
    bad = call(1, 0)
    bad.q[:] = float("nan")
    mask(planner, bad)
    assert mask(planner, replace(bad, step=StepInfo(1, 2, 10, "cond"))).all()


def test_centroids_are_warm_within_a_run_only() -> None:
    recipe = resolve("svg2", block_q=16, block_k=16, dense_steps=0, queries=4, keys=8, first=2, later=1)
    planner = Planner(recipe)
    cold = mask(planner, call(0, 0))
    assert torch.equal(mask(Planner(recipe), call(0, 0)), cold)
    warm = mask(planner, call(1, 1))
    assert not torch.equal(warm, mask(Planner(recipe), call(1, 1)))
    next_run = call(1, 1, step=StepInfo(2, 1, 10, "cond"))
    assert torch.equal(mask(planner, next_run), mask(Planner(recipe), call(1, 1)))
    other = call(2, 1, step=StepInfo(2, 2, 10, "uncond"))
    assert torch.equal(mask(planner, other), mask(Planner(recipe), call(1, 1)))


def test_a_reused_selection_is_corrected_by_the_present_tensors() -> None:
    layout = TokenLayout(grid=(4, 8, 12), text=5)
    recipe = resolve("svg-ear", density=0.3, queries=6, keys=12, block_q=16, block_k=16, every=2)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.length, 2, 16, generator=g) for _ in range(3))
    state = dit_accel.AttentionState()
    first = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state)
    second = dit_accel.attention(q, k, -v, layout=layout, recipe=recipe, state=state)
    torch.testing.assert_close(second, -first, rtol=1e-5, atol=1e-6)


# -- mixtures: several recipes with state, told apart by layer and step ---
def clustered(clusters: int) -> dict[str, Any]:
    """Return the settings of a case by clusters; recipes with other numbers of them cannot share their centroids."""
    recipe = resolve("svg2", density=0.3, queries=clusters, keys=2 * clusters)
    return {"order": recipe.order, "score": recipe.score, "select": recipe.select, "block_q": 16}


HALVES = {
    "base": RECIPE,
    "name": "halves",
    "every": 1,
    "cases": [
        {"depth": (0.0, 0.5), "steps": (0.0, 0.5), **clustered(4)},
        {"depth": (0.0, 0.5), "steps": (0.5, 1.0), **clustered(6)},
        {"depth": (0.5, 1.0), "steps": (0.0, 0.5), "every": 3},
        {"depth": (0.5, 1.0), "steps": (0.5, 1.0), "select": {"kind": "percentile", "density": 0.6}, "every": 9},
    ],
}


@pytest.mark.parametrize(("sites", "first"), [(8, [0, 1, 2, 3]), (5, [0, 1, 2]), (1, [0])])
def test_depth_is_a_share_of_the_sites(sites: int, first: list[int]) -> None:
    """Every site of a model of any depth lies in one half."""
    assert [site for site in range(sites) if Case(depth=(0.0, 0.5)).holds(site, sites, 0.0)] == first
    assert [site for site in range(sites) if Case(depth=(0.5, 1.0)).holds(site, sites, 0.0)] == [
        site for site in range(sites) if site not in first
    ]


def test_a_mixture_decides_as_its_parts_alone() -> None:
    """At every step and site as a planner that only ever had the recipe in force there, started with its window."""
    mixture = resolve(HALVES)
    planner, alone = Planner(mixture), {}
    for step in range(10):
        for layer in (0, 3, 4, 7):
            here = mixture.at(layer, 8, step / 10)
            parts = alone.setdefault((layer, here), Planner(here))
            attention = call(step, 100 * step + layer, layer)
            assert torch.equal(mask(planner, attention), mask(parts, attention)), (step, layer)
    assert len(alone) == 8


def test_a_later_window_decides_anew_what_an_earlier_one_kept() -> None:
    planner = Planner(resolve(HALVES))
    first = mask(planner, call(3, 0, 7))
    assert torch.equal(mask(planner, call(4, 1, 7)), first)  # kept for three steps
    later = mask(planner, call(5, 2, 7))
    assert float(later.float().mean()) > 0.5 > float(first.float().mean())
    assert torch.equal(mask(planner, call(9, 3, 7)), later)


def test_a_residual_of_another_window_is_measured_anew() -> None:
    residual = {"kind": "residual", "every": 20}
    cases = [{"steps": (0.0, 0.5), "correct": residual}, {"steps": (0.5, 1.0), "correct": {**residual, "growth": 0.1}}]
    planner = Planner(RECIPE.override(cases=tuple(cases)))
    full = []
    for step in range(10):
        plan = planner.plan(call(step, step))
        full.append(bool(plan.measures))
        attend.run(plan, *(getattr(call(step, step), name) for name in ("q", "k", "v")))
    assert [step for step, measures in enumerate(full) if measures] == [0, 5]


def test_a_total_is_asked_for_as_a_density_and_scales_the_cases() -> None:
    everything, band = {"kind": "all"}, {"options": [{"select": {"kind": "band", "density": 0.4}}]}
    mixture = resolve(
        {**HALVES, "total": 0.4, "cases": [*HALVES["cases"], {"select": everything}, {"heads": band}]}, density=0.2
    )
    assert (mixture.density, mixture.total) == (0.2, 0.2)
    assert mixture.select.asked == pytest.approx(0.15)
    asked = [case.select.asked if case.select else None for case in mixture.cases]
    assert asked == [pytest.approx(0.15), pytest.approx(0.15), None, pytest.approx(0.3), None, None]
    heads = mixture.cases[-1].heads
    assert heads is not None
    assert heads.options[0].select.asked == pytest.approx(0.2)
    assert mixture.at(0, 8, 0.0).total is None
    assert max(case.select.asked or 0 for case in mixture.override(density=1).cases if case.select) == 1
    with pytest.raises(ConfigError, match="density: input should be less than or equal to 1, got 2"):
        mixture.override(density=2)
