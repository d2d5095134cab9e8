"""The true attention of a call against the whole matrix: recall, error, mass between blocks, the best choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel import truth
from dit_accel.api import attention
from dit_accel.call import AttentionCall, Site
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo
from dit_accel.truth import block_mass, measure, quality, whole_blocks

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
    for chunk in (truth.CHUNK, 2 * 3 * layout.length * 10):  # all queries at once, and ten at a time
        monkeypatch.setattr(truth, "CHUNK", chunk)
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


def planned(call: AttentionCall, name: str, **changes: Any) -> tuple[torch.Tensor, Plan]:
    """Return output and plan of a recipe with small blocks, so that there is something to choose on a small grid."""
    recipe = resolve(name, density=0.4, block_q=32, block_k=16)
    if recipe.order.kind == "tile":
        recipe = recipe.override(picture=(1, 4, 8), video=(1, 4, 8))
    if recipe.order.kind == "kmeans":
        recipe = recipe.override(queries=6, keys=14)
    return attention(
        call.q, call.k, call.v, layout=call.layout, recipe=recipe.override(**changes), scale=call.scale,
        key_bias=call.key_bias, return_plan=True,
    )  # fmt: skip


def blocks_by_hand(plan: Plan, sample: int, head: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each query block and of each key block, those without any left out."""
    branch, out = plan.branches[0], []
    for order, block, length in (
        (branch.q_order, branch.block_q, plan.queries),
        (branch.k_order, branch.block_k, plan.keys),
    ):
        slots = list(range(length)) if order is None else order[sample % len(order), head % order.shape[1]].tolist()
        pieces = [slots[at : at + block] for at in range(0, len(slots), block)]
        out.append([[t for t in piece if t >= 0] for piece in pieces])
    return out[0], out[1]


def best_by_hand(mass: list[float], pairs: list[int], budget: float) -> float:
    """Return the most mass of as many pairs: blocks by their mass a pair, the last in part."""
    kept = 0.0
    for m, n in sorted(((m, n) for m, n in zip(mass, pairs, strict=True) if n), key=lambda one: -one[0] / one[1]):
        kept += m * min(1.0, budget / n)
        budget -= min(n, budget)
    return kept


@pytest.mark.parametrize(
    ("name", "place"),
    [("draft", "picture"), ("svg2", "picture"), ("svg1", "video"), ("gna", "picture"), ("clear", "video"),
     ("grat-x", "video"), ("svg-ear", "picture"), ("pbs", "video")],
)  # fmt: skip
def test_heads_and_blocks_are_those_of_the_whole_matrix(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters, heads with orders of their own, exact shapes and corrections, a ragged run of queries at a time."""
    call = call_on(LAYOUTS[place], 6, bias=True)
    out, plan = planned(call, name)
    monkeypatch.setattr(truth, "CHUNK", call.layout.length * 50)
    seen = measure(call, plan, out)
    weights, mask = true_weights(call), plan.to_mask().expand(2, 3, -1, -1)
    true = torch.einsum("bhqk,bkhd->bqhd", weights, call.v.double())
    s = call.layout.length
    for i, j in ((0, 0), (0, 2), (1, 1)):
        rows, cols = blocks_by_hand(plan, i, j)
        mass = [[float(weights[i, j][r][:, c].sum()) for c in cols] for r in rows]
        chosen = [[float(mask[i, j][r][:, c].double().mean()) if r and c else 0.0 for c in cols] for r in rows]
        torch.testing.assert_close(seen.mass[i, j], torch.tensor(mass), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.chosen[i, j], torch.tensor(chosen), atol=1e-6, rtol=0)
        assert float(seen.recall[i, j]) == pytest.approx(float((weights * mask)[i, j].sum()) / s, abs=1e-5)
        assert float(seen.density[i, j]) == pytest.approx(float(mask[i, j].double().mean()), abs=1e-6)
        error = float((out - true)[i, :, j].norm() / true[i, :, j].norm())
        assert float(seen.error[i, j]) == pytest.approx(error, rel=1e-4)
        pairs = [len(r) * len(c) for r in rows for c in cols]
        best = best_by_hand([m for row in mass for m in row], pairs, int(mask[i, j].sum()))
        assert float(seen.best_recall[i, j]) == pytest.approx(best / s, abs=1e-4)
        spent = float((seen.oracle[i, j].double() * seen.pairs[i, j]).sum())
        assert spent == pytest.approx(int(mask[i, j].sum()), rel=1e-5)
        assert not whole_blocks(plan) or float(seen.recall[i, j]) <= float(seen.best_recall[i, j]) + 1e-6
    assert whole_blocks(plan) == (name not in ("gna", "clear"))


def test_a_call_that_is_computed_in_full_keeps_everything() -> None:
    call = call_on(LAYOUTS["picture"], 7)
    out = torch.einsum("bhqk,bkhd->bqhd", true_weights(call), call.v.double()).float()
    for plan in (Plan(574, 574), planned(call, "rettention")[1]):
        assert plan.dense or plan.measures
        seen = quality(call, plan, out)
        assert (seen.recall, seen.best_recall) == (1, 1)
        assert seen.error < 1e-5
