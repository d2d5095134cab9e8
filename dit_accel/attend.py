"""The one path of an attention call: stages, plan, kernel per branch, merge, ledger, watchers."""

from __future__ import annotations

from dataclasses import replace

import torch

from .call import AttentionCall
from .engine import Engine
from .kernels.merge import merge_attention
from .sparsity.plan import Operands, Plan


def attend(call: AttentionCall, engine: Engine) -> torch.Tensor:
    """Run one attention call of an accelerated model, [B, S, H, D] in and out.

    Stages (completed keys and values, then editing controls) come first, so that a plan sees what will be attended.
    Under autocast all of it works in autocast's dtype, as torch's own attention does.
    """
    dtype = autocast_dtype(call.q)
    if dtype is not None:
        return _in_dtype(call, engine, dtype)
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


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives attention where `x` lies, None where it is off."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast as autocast does, which leaves float64 alone."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _in_dtype(call: AttentionCall, engine: Engine, dtype: torch.dtype) -> torch.Tensor:
    """Run a call in `dtype` with autocast off, which would round the sums that a plan decides by."""
    kind = call.q.device.type

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, dtype=dtype):
            return call.stock(q, k, v)

    given = {name: getattr(call, name) for name in ("q", "k", "v", "q_raw", "k_raw")}
    lower = {name: None if x is None else cast(x, dtype) for name, x in given.items()}
    with torch.autocast(kind, enabled=False):
        return attend(replace(call, **lower, stock=stock), engine)


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
