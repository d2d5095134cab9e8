"""Axis 4: when decisions are reused, and that state never crosses runs, branches, samples or layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel.call import AttentionCall, Site
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError, PlanError
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import planner as planner_module
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.sparsity.state import state_bytes
from dit_accel.step import StepInfo

LAYOUT = TokenLayout(grid=(1, 16, 16))
RECIPE: Recipe = resolve("draft", density=0.3, picture=(1, 4, 4), block_q=16, block_k=16, dense_steps=0, every=2)
SITE = Site("a", "blocks", 0, torch.nn.Identity())


def call(at: int, seed: int, **changes: Any) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 256, 2, 16, generator=g) for _ in range(3))
    made = AttentionCall(SITE, StepInfo(1, at, 8, "cond"), LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v)
    return replace(made, **changes)


def mask(planner: Planner, attention: AttentionCall) -> torch.Tensor:
    return planner.plan(attention).check().to_mask()


def fresh(attention: AttentionCall) -> torch.Tensor:
    return mask(Planner(RECIPE), attention)


def test_a_decision_is_reused_for_every_steps() -> None:
    planner = Planner(RECIPE)
    first = mask(planner, call(0, 0))
    assert torch.equal(mask(planner, call(1, 1)), first)
    assert torch.equal(mask(planner, call(2, 2)), fresh(call(2, 2)))
    assert not torch.equal(fresh(call(2, 2)), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": StepInfo(1, 1, 8, "uncond")},
        {"step": StepInfo(2, 1, 8, "cond")},
        {"step": StepInfo(1, 0, 8, "cond")},
        {"step": StepInfo(1, 5, 8, "cond")},
        {"site": Site("b", "blocks", 1, torch.nn.Identity())},
    ],
    ids=["branch", "run", "same step again", "later step", "site"],
)
def test_nothing_stale_is_used(changes: dict[str, Any]) -> None:
    """All but 'same step again' must decide anew; at age 0 the kept decision of this very step is right."""
    planner = Planner(RECIPE)
    old = mask(planner, call(0, 0))
    new = call(1, 1, **changes)
    same_step = new.step == StepInfo(1, 0, 8, "cond")
    assert torch.equal(mask(planner, new), old if same_step else fresh(new))


def test_another_size_or_batch_decides_anew() -> None:
    planner = Planner(RECIPE)
    mask(planner, call(0, 0))
    wide = TokenLayout(grid=(1, 8, 32))
    assert torch.equal(mask(planner, call(1, 1, layout=wide)), fresh(call(1, 1, layout=wide)))
    two = call(1, 1)
    two = replace(two, q=two.q.repeat(2, 1, 1, 1), k=two.k.repeat(2, 1, 1, 1))
    assert mask(planner, two).shape[0] == 2


def test_a_new_run_frees_the_old_ones_state() -> None:
    planner = Planner(RECIPE)
    for branch in ("cond", "uncond"):
        planner.plan(call(0, 0, step=StepInfo(1, 0, 8, branch)))
    assert planner.nbytes == 2 * state_bytes(RECIPE, LAYOUT, batch=1, heads=2, dim=16) > 0
    planner.plan(call(0, 0, step=StepInfo(2, 0, 8, "cond")))
    assert planner.nbytes == state_bytes(RECIPE, LAYOUT, batch=1, heads=2, dim=16)
    planner.clear()
    assert planner.nbytes == 0


def test_state_over_the_limit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "STATE_LIMIT", 10)
    with pytest.raises(PlanError, match="would keep more than"):
        Planner(RECIPE).plan(call(0, 0))
    Planner(RECIPE.override(every=1)).plan(call(0, 0))


def test_geometric_plans_are_made_once_per_layout() -> None:
    planner = Planner(resolve("grat", picture=(1, 4, 4)))
    assert planner.plan(call(0, 0)) is planner.plan(call(3, 5))
    for width in range(2, 40):
        planner.plan(call(0, 0, layout=TokenLayout(grid=(1, 4, width))))
    assert len(planner._fixed) == planner_module.LAYOUT_LIMIT


@pytest.mark.parametrize(
    ("changes", "step", "reason"),
    [
        ({"dense_steps": 0.5}, StepInfo(1, 3, 8, "0"), "first 4 of 8 steps stay dense"),
        ({"dense_steps": 0.5}, StepInfo(1, 4, 8, "0"), ""),
        ({"dense_layers": 1}, StepInfo(1, 4, 8, "0"), "first 1 layers stay dense"),
        ({"density": 1}, StepInfo(1, 4, 8, "0"), "density 1 is dense"),
        ({"dense_steps": 0.2}, StepInfo(1, None, None, "0", reason="no step known"), "no step known"),
        ({"every": 1}, StepInfo(1, None, None, "0", reason="no step known"), ""),
    ],
)
def test_reasons_to_stay_dense(changes: dict[str, Any], step: StepInfo, reason: str) -> None:
    planner = Planner(RECIPE.override(**changes))
    assert planner.dense_reason(SITE, step, LAYOUT, torch.device("cpu")) == reason


def test_second_run_equals_a_fresh_process() -> None:
    """State carried over a change of size, a shorter run and other seeds must not show."""
    options = {
        "density": 0.4,
        "every": 3,
        "picture": (1, 4, 4),
        "block_q": 16,
        "block_k": 16,
        "dense_steps": 0,
    }
    pipe, generation = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", **options):
        expected = tiny.generate(pipe, generation, steps=5, seed=7)
    pipe, generation = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", **options):
        tiny.generate(pipe, generation, steps=2, seed=1)
        tiny.generate(pipe, generation, steps=3, seed=2, height=20, width=44)
        assert torch.equal(tiny.generate(pipe, generation, steps=5, seed=7), expected)


def test_guidance_branches_share_nothing() -> None:
    """With the second branch's text changed, the first branch's plans must stay as they were."""
    options = {
        "density": 0.4,
        "every": 4,
        "picture": (1, 4, 4),
        "block_q": 16,
        "block_k": 16,
        "dense_steps": 0,
    }
    kept: list[dict[tuple[str, str], torch.Tensor]] = []
    for negative in ("a dog", "the red taco"):
        pipe, generation = tiny.flux()
        with dit_accel.accelerate(pipe, "draft", **options) as handle:
            tiny.generate(pipe, generation, steps=1, negative_prompt=negative, true_cfg_scale=3.0)
            plans = handle._engine.planner._kept
            kept.append({key: plan.plan.bits.clone() for key, plan in plans.items()})
    assert {branch for _, branch in kept[0]} == {"cond", "uncond"}
    for key, bits in kept[0].items():
        if key[1] == "cond":
            assert torch.equal(bits, kept[1][key])
    assert any(not torch.equal(kept[0][k], kept[1][k]) for k in kept[0] if k[1] == "uncond")


def test_functional_state_belongs_to_one_recipe() -> None:
    q, k, v = (torch.randn(1, 256, 2, 16) for _ in range(3))
    state = dit_accel.AttentionState()
    run = {"layout": LAYOUT, "state": state, "return_plan": True}
    _, first = dit_accel.attention(q, k, v, recipe=RECIPE, **run)
    _, second = dit_accel.attention(k, q, v, recipe=RECIPE, **run)
    _, third = dit_accel.attention(k, q, v, recipe=RECIPE, **run)
    assert torch.equal(first.to_mask(), second.to_mask())
    assert not torch.equal(second.to_mask(), third.to_mask())
    with pytest.raises(ConfigError, match="it belongs to recipe 'draft'"):
        dit_accel.attention(q, k, v, recipe="grat", layout=LAYOUT, state=state)
