"""Planned attention calls outside of any model: the kinds of a run, how often each comes, and inputs for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from dit_accel.attend import attend, run
from dit_accel.call import AttentionCall, Site
from dit_accel.config import Recipe
from dit_accel.engine import Engine
from dit_accel.kernels.choice import prefer
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import planner
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

STEPS, LAYERS = 50, 40  # of the run over which a decision's cost is spread
SITE = 2  # the layer that is timed: one that no recipe keeps dense
KINDS = ("first", "again", "kept")  # decides with nothing to start from; decides; takes over a decision


@dataclass(frozen=True)
class Case:
    """A model's attention call: how its tokens lie, heads and head dim."""

    name: str
    layout: TokenLayout
    heads: int
    dim: int


CASES = (
    Case("wan-14b-720p-81", TokenLayout(grid=(21, 45, 80), text=48), 40, 128),
    Case("flux-4096", TokenLayout(grid=(1, 256, 256), text=512), 24, 128),
    Case("flux-1024", TokenLayout(grid=(1, 64, 64), text=512), 24, 128),
)
COUNTED = Case("counted", TokenLayout(grid=(4, 6, 10), text=7), 1, 64)
TINY = Case("tiny", TokenLayout(grid=(2, 17, 24), text=7), 2, 32)


def always_sparse(name: str) -> Recipe:
    """Return a recipe of the table without the calls that it leaves dense."""
    return resolve(name, dense_steps=0, dense_layers=0, adaptive=False)


def shrunk(name: str) -> Recipe:
    """Return the same with units of a few tokens, so that a small grid has as much to decide as a large one."""
    recipe = always_sparse(name).override(block_q=16, block_k=16)
    if recipe.order.kind == "tile":
        recipe = recipe.override(video=(2, 4, 4))
    return recipe.override(queries=5, keys=14, first=1) if recipe.order.kind == "kmeans" else recipe


@dataclass
class Calls:
    """Attention calls of one recipe on fixed random queries, keys and values."""

    recipe: Recipe
    case: Case
    device: torch.device
    dtype: torch.dtype
    engine: Engine = field(init=False)
    qkv: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.recipe)
        shape = (1, self.case.layout.length, self.case.heads, self.case.dim)
        self.qkv = tuple(torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(3))
        self._run = 0

    def call(self, step: int, layer: int = SITE) -> AttentionCall:
        """Return the call of one step of the current run."""
        site = Site(str(layer), "a", layer, torch.nn.Identity(), LAYERS)
        at = StepInfo(self._run, step, STEPS, "0")
        return AttentionCall(site, at, self.case.layout, *self.qkv, self.case.dim**-0.5, stock=_never)

    def prepared(self, kind: str) -> AttentionCall:
        """Bring the planner to where a call of this kind comes next, and return that call."""
        if kind == "kept" and not self.recipe.content_driven:
            return self.call(1)
        self._run += 1
        if kind == "first":
            return self.call(0)
        attend(self.call(0), self.engine)
        if kind == "again":
            return self.call(round(self.recipe.decide_at[0] * STEPS) if self.recipe.decide_at else self.recipe.every)
        return self.call(0, SITE + 1) if self.recipe.decide_layers else self.call(1)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Run a call as an accelerated model would."""
        return attend(call, self.engine)


def _never(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a planned call ran dense")


@torch.no_grad()
def uses(recipe: Recipe) -> dict[str, int]:
    """Count the kinds of planned calls in a run of `STEPS`, by letting the planner decide on a tiny layout.

    Over all `LAYERS` where layers share decisions, else for one; full steps of a residual are no planned calls.
    """
    small = recipe.override(block_q=16, block_k=16)
    layout, original = TokenLayout(grid=(2, 8, 12), text=3), planner.decide
    qkv = [torch.randn(1, layout.length, 2, 16) for _ in range(3)]
    seen: list[str] = []

    def decide(recipe: Recipe, inputs: Any) -> Any:
        seen.append("first" if inputs.warm is None else "again")
        return original(recipe, inputs)

    counts: Counter[str] = Counter()
    with patch.object(planner, "decide", decide):
        deciding, layers = Planner(small), range(LAYERS if recipe.decide_layers else 1)
        for step in range(STEPS):
            for layer in layers:
                seen.clear()
                site = Site(str(layer), "a", layer, torch.nn.Identity(), LAYERS)
                call = AttentionCall(site, StepInfo(1, step, STEPS, "0"), layout, *qkv, 0.25, stock=_never)
                made = deciding.plan(call)
                if not made.measures:
                    kind = seen[0] if seen and recipe.content_driven else "kept"
                    counts[kind] += 1
                for fix in made.fixes:
                    _pretend(fix, call)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _pretend(fix: Any, call: AttentionCall) -> None:
    """Give a residual something to have measured."""
    missing = getattr(fix, "missing", None)
    if missing is not None and missing.share is None:
        missing.share = torch.ones(1, call.q.shape[2], call.q.shape[1])
        missing.rest = torch.zeros_like(call.q)


def sampled_error(calls: Calls, rows: int = 48) -> float:
    """Return ‖out - gold‖ / ‖gold‖ of a call's branches, before corrections, over random queries against float64.

    NaN where the outputs are not finite. The gold attends the very pairs that the plan says; an operator, which has
    none, is held against itself in torch's operations.
    """
    call = calls.prepared("first")
    plan = calls.engine.planner.plan(call)
    if plan.operator:
        return _of_operator(plan, call)
    plan = replace(plan, pooled=(), fixes=())
    out = run(plan, call.q, call.k, call.v, call.scale)
    if not out.isfinite().all():
        return math.nan
    top = bottom = 0.0
    for head, tokens in _sample(calls.case, rows, out.device):
        seen = plan.rows(tokens, head=head)
        logits = call.q[0, tokens, head].double() @ call.k[0, :, head].double().T * call.scale
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)  # a skipped head attends nothing
        gold = weights @ call.v[0, :, head].double()
        top += float((out[0, tokens, head] - gold).square().sum())
        bottom += float(gold.square().sum())
    calls.engine.clear()  # what a residual planned to measure was left out
    return math.sqrt(top / max(bottom, 1e-300))


def _of_operator(plan: Plan, call: AttentionCall) -> float:
    out = run(plan, call.q, call.k, call.v, call.scale)
    with prefer("reference"):
        gold = run(plan, call.q, call.k, call.v, call.scale)
    return float((out - gold).norm() / gold.norm())


def _sample(case: Case, rows: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield a few heads, and random tokens for each."""
    heads = torch.randperm(case.heads)[:4].tolist()
    for head in heads:
        yield head, torch.randint(case.layout.length, (rows // len(heads),)).to(device)
