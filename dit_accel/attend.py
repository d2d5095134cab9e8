"""The one path of an attention call: stages, plan, kernel per branch, merge, ledger, watchers."""

from __future__ import annotations

import torch

from .call import AttentionCall
from .engine import Engine
from .kernels.merge import merge_attention
from .sparsity.plan import Operands, Plan


def attend(call: AttentionCall, engine: Engine) -> torch.Tensor:
    """Run one attention call of an accelerated model, [B, S, H, D] in and out.

    Stages (completed keys and values, then editing controls) come first, so that a plan sees what will be attended.
    """
    for stage in engine.stages:
        call = stage(call)
    plan = engine.planner.plan(call)
    with engine.ledger.timed(call, plan):
        if plan.dense:
            out = call.stock(call.q, call.k, call.v)
        else:
            out = run(plan, call.q, call.k, call.v, call.scale, call.key_bias)
    for watch in engine.watchers:
        watch(call, plan, out)
    return out


def run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a sparse plan, one kernel launch a branch, merge the branches exactly, and correct the result."""
    given = Operands(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, key_bias, plan.precision)
    results = [branch.run(given) for branch in plan.branches]
    if len(results) > 1:
        outs, lses = zip(*results, strict=True)
        results = [merge_attention(outs, lses)]
    for pooled in plan.pooled:
        results = [pooled.run(given, *results)]
    ((out, lse),) = results
    for fix in plan.fixes:
        out = fix.apply(out, lse, given)
    return out
