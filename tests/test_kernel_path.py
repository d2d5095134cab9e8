"""The path a GPU takes, walked on a CPU by Triton's interpreter: it decides and computes as torch does."""

from __future__ import annotations

import pytest
import torch

from dit_accel.attend import attend
from dit_accel.call import AttentionCall, Site
from dit_accel.engine import Engine
from dit_accel.kernels.choice import prefer
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

LAYOUT = TokenLayout(grid=(1, 7, 9), text=5)
NAMES = ["balanced", "draft", "jenga", "sparge", "rectified"]
NAMES += ["xattention", "pbs", "minference", "double-sparsity", "hip", "sale", "svg-ear", "hilbert-ear"]


@pytest.mark.parametrize(
    "name",
    [
        "balanced",
        "draft",
        "jenga",
        "sparge",
        "rectified",
        "xattention",
        "pbs",
        "minference",
        "double-sparsity",
        "svg-ear",
        "hilbert-ear",
    ],
)
@torch.no_grad()
def test_decides_and_computes_as_torch(name: str) -> None:
    """Budgets by row and by head, top-p, likeness, a correction, runs, sampled rows, maxima; a kept decision too."""
    asked = {"density": 0.5} if name.endswith("-ear") else {}  # else it keeps all of so few clusters
    recipe = resolve(name, block_q=16, block_k=16, dense_steps=0, adaptive=False, every=2, **asked)
    if recipe.order.kind == "tile":
        recipe = recipe.override(picture=(1, 4, 4))
    if name in ("xattention", "pbs"):
        recipe = recipe.override(p=0.5)  # so few units would all be taken
    if name == "hilbert-ear":
        recipe = recipe.override(block_q=32, key_run=16)
    q, k, v = torch.randn(3, 1, LAYOUT.length, 1, 16)
    made = {}
    for backend in ("triton", "reference"):
        engine, outs = Engine(recipe), []
        for step in (0, 1):
            at = StepInfo(1, step, 10, "0")
            call = AttentionCall(
                Site("a", "a", 2, torch.nn.Identity(), 8), at, LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v
            )
            with prefer(backend):
                outs.append(attend(call, engine))
                plan = engine.planner.plan(call)
        made[backend] = outs, plan.check().to_mask(), float(plan.density())
    (ours, mask, density), (theirs, expected, right) = made["triton"], made["reference"]
    assert torch.equal(mask, expected)
    assert density == right
    assert density < 1
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
