"""Agent attention, an operator: against a slow restatement, in its dense limit, and what it has instead of a mask."""

from __future__ import annotations

import itertools
import math

import odd_video
import pytest
import torch
from restate import cell, made, on_grid, samples, tensors

import dit_accel
from dit_accel.attend import run
from dit_accel.config import AgentSelect, RasterOrder
from dit_accel.errors import PlanError
from dit_accel.layout import Grid, Pad, Text, TokenLayout
from dit_accel.sparsity.agents import agent_plan
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.recipes import resolve
from dit_accel.sparsity.tiling import tiling

SMALL = {"block_q": 16, "block_k": 16}
LAYOUTS = [
    TokenLayout(grid=(1, 13, 11), text=5),
    TokenLayout(grid=(5, 6, 7), text=3, text_first=False),
    TokenLayout(grid=(2, 8, 8)),
    TokenLayout([Grid(1, 4, 6, role="reference"), Text(3), Grid(2, 6, 8), Pad(2)]),
    odd_video.LAYOUT,
]
Shape = tuple[int, int, int]


def parts_of(shape: Shape, wished: float) -> Shape:
    """Cut each axis so that there are about as many cells as wished, and nearly cubes, by trying all ways."""

    def off(parts: Shape) -> float:
        sides = [n / part for n, part in zip(shape, parts, strict=True)]
        long = [side for side, n in zip(sides, shape, strict=True) if n > 1] or [1.0]
        return abs(math.prod(parts) / wished - 1) + 0.1 * math.log(max(max(sides) / min(long), 1))

    return min(itertools.product(*(range(1, n + 1) for n in shape)), key=off)


def cells(layout: TokenLayout, density: float) -> list[list[int]]:
    """Group the tokens of each grid into the cells that have an agent."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (start, grid) in enumerate(layout.spans()):
        if isinstance(grid, Grid):
            parts = parts_of(grid.shape, max(grid_share(layout, density) * grid.length / 2, 1))
            for token in range(start, start + grid.length):
                at = cell(layout, token)
                assert at is not None
                place = [i * part // n for i, part, n in zip(at, parts, grid.shape, strict=True)]
                groups.setdefault((number, *place), []).append(token)
    return list(groups.values())


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = q.double() @ k.double().T * scale
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("density", "power", "value"), [(0.125, 0.3, 0.075), (0.4, 1.0, 0.0)])
def test_agent(layout: TokenLayout, density: float, power: float, value: float) -> None:
    """softmax(Q A) softmax(A K) V + value V on the grid; text one by one, both merged by what their keys weigh."""
    recipe = resolve("agent", density=density, power=power, value=value, **SMALL)
    out, plan, q, k, v = made(recipe, layout, structured=True)
    groups, grid = cells(layout, density), on_grid(layout)
    text = [t for t in range(layout.length) if t not in set(grid)]
    pairs = 2 * len(groups) * len(grid) + layout.length**2 - len(grid) ** 2
    assert float(plan.density()) == pytest.approx(pairs / layout.length**2)
    assert abs(float(plan.density()) / density - 1) < 0.2 or plan.note
    home = {token: number for number, group in enumerate(groups) for token in group}
    for b, h in samples(layout):
        q1, k1, v1 = q[b, :, h], k[b, :, h], v[b, :, h]
        agents = torch.stack([q1[group].mean(0) for group in groups])
        heard, weight = attended(agents, k1[grid], v1[grid], 0.25)
        told, _ = attended(q1[grid], agents, heard, 0.25**power)
        gold = told + value * v1[grid]
        if text:
            words, its = attended(q1[grid], k1[text], v1[text], 0.25)
            share = (its - torch.stack([weight[home[t]] for t in grid])).sigmoid()[:, None]
            gold = share * words + (1 - share) * gold
            exact, _ = attended(q1[text], k1, v1, 0.25)
            torch.testing.assert_close(out[b, text, h].double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[b, grid, h].double(), gold, rtol=1e-4, atol=1e-5)


def test_padding_is_not_heard() -> None:
    layout = LAYOUTS[0]
    recipe = resolve("agent", **SMALL)
    q, k, v = tensors(layout)
    bias = torch.zeros(2, 1, layout.length)
    bias[1, :, 3:5] = -math.inf
    out = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, key_bias=bias)
    k[1, 3:5], v[1, 3:5] = 7.0, 9.0
    again = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, key_bias=bias)
    assert torch.equal(out, again)


def test_as_many_agents_as_tokens_that_ask_for_themselves_are_dense_attention() -> None:
    """Each query its own agent, in a softmax so sharp that it listens to no other one."""
    layout = TokenLayout(grid=(2, 5, 7), text=4)
    tiles = tiling(layout, RasterOrder(), 16, 16)
    plan = agent_plan(tiles, AgentSelect(power=0.0, value=0.0), 2.0, torch.device("cpu"))
    q, k, v = tensors(layout)
    q = 30 * torch.nn.functional.normalize(q, dim=-1)
    k = k / 30
    gold = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.25)
    torch.testing.assert_close(run(plan, q, k, v, 0.25), gold.transpose(1, 2), rtol=1e-4, atol=1e-4)
    stock, dense = dit_accel.attention(q, k, v, layout=layout, recipe="agent", density=1, return_plan=True)
    assert dense.dense
    assert not dense.operator
    assert torch.equal(stock, torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))  # fmt: skip


def test_an_operator_has_no_mask_and_says_so() -> None:
    _, plan, *_ = made(resolve("agent", **SMALL), LAYOUTS[2])
    assert not plan.dense
    assert plan.nbytes > 0
    for ask in (plan.to_mask, plan.draw, lambda: plan.rows(torch.tensor([0]))):
        with pytest.raises(PlanError, match="agent attention is an operator, which computes no pairs"):
            ask()


def test_one_plan_serves_all_layers_and_samples() -> None:
    layout, state = LAYOUTS[1], dit_accel.AttentionState()
    plans = []
    for seed in range(2):
        q, k, v = tensors(layout, seed)
        recipe = resolve("agent", **SMALL)
        plans.append(dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state, return_plan=True)[1])
    assert plans[0] is plans[1]
