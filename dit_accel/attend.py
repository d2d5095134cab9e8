"""The one path of an attention call: stages, plan, kernel per branch, merge, ledger."""

from __future__ import annotations

import torch

from .call import AttentionCall
from .engine import Engine
from .kernels.block_sparse import block_sparse_attention
from .kernels.merge import merge_attention
from .sparsity.plan import Plan


def attend(call: AttentionCall, engine: Engine) -> torch.Tensor:
    """Run one attention call of an accelerated model, [B, S, H, D] in and out.

    Stages (completed keys and values, then editing controls) come first, so that a plan sees what will be attended.
    """
    for stage in engine.stages:
        call = stage(call)
    plan = engine.planner.plan(call)
    with engine.ledger.timed(call, plan):
        if plan.dense:
            return call.stock(call.q, call.k, call.v)
        return run(plan, call.q, call.k, call.v, call.scale, call.key_bias)


def run(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a sparse plan, one kernel launch a branch, merge the branches exactly, and correct the result."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    results = [
        block_sparse_attention(
            q,
            k,
            v,
            branch.index,
            branch.count,
            block_q=branch.block_q,
            block_k=branch.block_k,
            full_count=branch.full_count,
            q_order=branch.q_order,
            k_order=branch.k_order,
            key_bias=_add(branch.key_bias, key_bias),
            predicate=branch.predicate,
            scale=factor,
        )
        for branch in plan.branches
    ]
    results += [pooled.run(q, factor) for pooled in plan.pooled]
    out = results[0][0]
    if len(results) > 1:
        outs, lses = zip(*results, strict=True)
        out = merge_attention(outs, lses)[0]
    for fix in plan.fixes:
        out = fix.apply(out, q, k, v, factor, key_bias)
    return out


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a + b if a is not None and b is not None else a if a is not None else b
