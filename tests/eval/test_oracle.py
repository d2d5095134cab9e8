"""The oracle: the best of all choices of its blocks, at the asked density, with all text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_truth import LAYOUTS, call_on

from dit_accel import recipes
from dit_accel.api import attention
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.eval.oracle import OraclePlanner
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve
from dit_accel.truth import block_mass, quality


def oracle_plan(call: AttentionCall, like: Recipe) -> Any:
    return OraclePlanner(like).plan(call)


def _same_blocks(plan: Plan, other: Plan) -> bool:
    """Say whether two plans choose among the same blocks; a recipe with other ones has a bound of its own only."""
    a, b = plan.branches[0], other.branches[0]
    if len(plan.branches) > 1 or a.predicate is not None or a.q_order is None or b.q_order is None:
        return False
    assert a.k_order is not None
    assert b.k_order is not None
    return torch.equal(a.q_order, b.q_order) and torch.equal(a.k_order, b.k_order)


@pytest.mark.parametrize("density", [0.5, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_recipe_keeps_more_than_the_oracle_of_its_blocks(layout: TokenLayout, density: float) -> None:
    """Every recipe with a density: neither the bound from its own blocks nor an oracle that computes less is passed."""
    call = call_on(layout, 3)
    compared = 0
    for recipe in recipes().values():
        try:
            asked = recipe.override(density=density)
        except ConfigError:
            continue
        out, plan = attention(
            call.q, call.k, call.v, layout=layout, recipe=asked, scale=call.scale, return_plan=True
        )  # fmt: skip
        if plan.dense:
            continue
        seen = quality(call, plan, out)
        if seen.recall is None:
            assert plan.operator
            continue
        if seen.best_recall is not None:
            assert seen.recall <= seen.best_recall + 1e-5, recipe.name
        best = oracle_plan(call, asked.override(density=min(1.0, float(plan.density()) + 0.06)))
        if not best.dense and _same_blocks(plan, best) and float(best.density()) >= float(plan.density()):
            held = quality(call, best, out).recall
            assert held is not None
            assert held >= seen.recall - 1e-5, recipe.name
            compared += 1
    assert compared >= 3


def test_the_best_choice_is_the_best_of_all_choices() -> None:
    """On a grid small enough to try every subset of blocks of the same cost."""
    from itertools import combinations

    layout = TokenLayout(grid=(1, 16, 16))
    call = call_on(layout, 4, heads=1)
    recipe = resolve("draft", density=0.5).override(order={"kind": "raster"}, keeps={"own": False})
    tiling = tiling_for(recipe, layout)
    mask = OraclePlanner(recipe).plan(call).branches[0].block_mask(layout.length // tiling.block_k)
    slots = tiling.on(torch.device("cpu")).slots[None, None]
    mass = block_mass(call, slots, slots, tiling.unit, tiling.unit)
    assert tiling.units == 2
    for sample in range(2):
        every = [sum(mass[sample, 0].flatten()[list(pair)]) for pair in combinations(range(4), 2)]
        kept = mask[sample, 0].view(2, tiling.unit // tiling.block_q, 2, -1).any(1).any(-1)
        possible = [
            v for v, pair in zip(every, combinations(range(4), 2), strict=True) if {p // 2 for p in pair} == {0, 1}
        ]
        assert float((mass[sample, 0] * kept).sum()) >= float(max(possible)) - 1e-4


def test_the_oracle_keeps_the_asked_density_and_all_text() -> None:
    layout = LAYOUTS["picture"]
    call = call_on(layout, 5)
    plan = oracle_plan(call, resolve("draft", density=0.3)).check()
    mask = plan.to_mask()
    assert float(plan.density()) == pytest.approx(0.3, abs=0.06)
    assert mask[..., :7].all()
    assert mask[..., :7, :].all()


def test_the_oracle_needs_a_density() -> None:
    with pytest.raises(ConfigError, match="has no density"):
        OraclePlanner(recipes()["grat-b"])
