"""The one path of an attention call: stages, plan, kernel per branch, merge, ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .kernels.block_sparse import block_sparse_attention, unsupported_reasons
from .kernels.merge import merge_attention
from .layout import TokenLayout
from .sparsity.plan import Plan
from .step import StepInfo

if TYPE_CHECKING:
    from .acceleration import Engine
    from .hosts.family import Site

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything known about one attention call.

    `q`, `k`, `v` [B, S, H, D] with whatever strides they have, rotated. `stock` runs the attention the user has
    configured on such tensors. `key_bias` [B|1, H|1, keys] holds the padding (-inf). `q_raw`, `k_raw` are the
    tensors before rotation and `rotate` turns them, where the host can give them.
    """

    site: Site
    step: StepInfo
    layout: TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    stock: Attention
    key_bias: torch.Tensor | None = None
    q_raw: torch.Tensor | None = None
    k_raw: torch.Tensor | None = None
    rotate: Callable[[torch.Tensor], torch.Tensor] | None = None


Stage = Callable[[AttentionCall], AttentionCall]


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
    """Compute a sparse plan, one kernel launch a branch, and merge the branches exactly."""
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
            scale=scale,
        )
        for branch in plan.branches
    ]
    if len(results) == 1:
        return results[0][0]
    outs, lses = zip(*results, strict=True)
    return merge_attention(outs, lses)[0]


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a + b if a is not None and b is not None else a if a is not None else b


@lru_cache(maxsize=256)
def kernel_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return which backend runs sparse calls on such tensors, and why it is not the fast one ('' if it is)."""
    if device.type != "cuda":
        return "reference", f"the Triton kernels run on CUDA devices, this is {device.type}"
    reasons = unsupported_reasons("triton", device=device, dtype=dtype, head_dim=head_dim)
    return ("reference", "; ".join(reasons)) if reasons else ("triton", "")
