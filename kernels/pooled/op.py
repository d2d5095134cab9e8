"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::pooled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor computed, Tensor row, float scale, int first, "
    "Tensor? into, Tensor? into_lse, str? backend) -> (Tensor, Tensor)",
)
def pooled_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    computed: Tensor,
    row: Tensor,
    scale: float,
    first: int,
    into: Tensor | None,
    into_lse: Tensor | None,
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """Run `pooled_attention` from compiled code."""
    from .api import pooled_attention  # which imports this file

    both = None if into is None or into_lse is None else (into, into_lse)
    out, lse = pooled_attention(q, k, v, bias, computed, row, scale, first=first, into=both, backend=backend)
    return out.contiguous(), lse.contiguous()


@pooled_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
