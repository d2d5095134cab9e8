"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::pooled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor computed, Tensor row, float scale, int first, "
    "str? backend) -> (Tensor, Tensor)",
)
def pooled_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, computed: Tensor, row: Tensor, scale: float, first: int, backend: Any
) -> tuple[Tensor, Tensor]:
    """Run `pooled_attention` from compiled code."""
    from .api import pooled_attention  # which imports this file

    out, lse = pooled_attention(q, k, v, bias, computed, row, scale, first=first, backend=backend)
    return out.contiguous(), lse.contiguous()


@pooled_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)
