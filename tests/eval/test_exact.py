"""Recall, error and the oracle against slow restatements on ragged grids with text, and the oracle's promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel import recipes
from dit_accel.api import attention
from dit_accel.call import AttentionCall, Site
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.eval import exact
from dit_accel.eval.exact import block_mass, quality
from dit_accel.eval.oracle import OraclePlanner
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

LAYOUTS = {
    "picture": TokenLayout(grid=(1, 21, 27), text=7),
    "video": TokenLayout(grid=(5, 9, 11), text=5, text_first=False),
}


def call_on(layout: TokenLayout, seed: int, bias: bool = False, heads: int = 3) -> AttentionCall:
    """Make queries and keys that vary smoothly over the sequence, so that blocks differ in worth."""
    make = torch.Generator().manual_seed(seed)
    drift = torch.linspace(0, 12, layout.length)[None, :, None, None]
    phase = torch.rand(2, 1, heads, 16, generator=make) * 6
    q, k = ((drift + phase).sin() * 2 + torch.randn(2, layout.length, heads, 16, generator=make) for _ in range(2))
    v = torch.randn(2, layout.length, heads, 16, generator=make)
    masked = torch.zeros(2, 1, layout.length)
    masked[1, :, :3] = float("-inf")
    site = Site("site", "site", 0, torch.nn.Identity())
    step = StepInfo(1, 0, 2, "0")
    return AttentionCall(site, step, layout, q, k, v, 0.25, lambda *_: q, key_bias=masked if bias else None)


def true_weights(call: AttentionCall) -> torch.Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", call.q.double(), call.k.double()) * call.scale
    return (logits if call.key_bias is None else logits + call.key_bias.double()[:, :, None]).softmax(-1)


@pytest.mark.parametrize("bias", [False, True], ids=["all keys", "masked keys"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_recall_and_error_are_those_of_the_whole_matrix(
    layout: TokenLayout, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_on(layout, 1, bias)
    out, plan = attention(
        call.q, call.k, call.v, layout=layout, recipe="draft", density=0.4, scale=call.scale, key_bias=call.key_bias,
        return_plan=True,
    )  # fmt: skip
    weights = true_weights(call)
    true = torch.einsum("bhqk,bkhd->bqhd", weights, call.v.double())
    recall = float((weights * plan.to_mask()).sum(-1).mean())
    error = float((out - true).norm() / true.norm())
    assert 0.1 < error < 2
    for chunk in (exact.CHUNK, 2 * 3 * layout.length * 10):  # all queries at once, and ten at a time
        monkeypatch.setattr(exact, "CHUNK", chunk)
        seen = quality(call, plan, out)
        assert seen.recall == pytest.approx(recall, abs=1e-5)
        assert seen.error == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_block_mass_is_the_sum_over_the_tokens_of_two_blocks(layout: TokenLayout) -> None:
    call = call_on(layout, 2)
    tiling = tiling_for(resolve("draft", density=0.3), layout)
    slots = tiling.on(torch.device("cpu")).slots
    mass = block_mass(call, slots[None, None], slots[None, None], tiling.unit, tiling.unit)
    weights = true_weights(call)
    units = [[int(t) for t in unit if t >= 0] for unit in slots.view(-1, tiling.unit)]
    for i, rows in enumerate(units):
        for j, cols in enumerate(units):
            expected = weights[:, :, rows][..., cols].sum((-1, -2))
            torch.testing.assert_close(mass[..., i, j].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mass.sum((-1, -2)), torch.full((2, 3), float(layout.length)))


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
