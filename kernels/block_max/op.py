"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::block_max",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor q_slots, Tensor k_slots, int unit, float scale, Tensor? q_bias, "
    "Tensor? k_bias, str? backend) -> Tensor",
)
def max_op(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    backend: Any,
) -> Tensor:
    """Run `block_max` from compiled code."""
    from .api import block_max  # which imports this file

    return block_max(q, k, q_slots, k_slots, unit, scale, q_bias, k_bias, backend=backend).contiguous()


@max_op.register_fake
def _(q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, *_: Any) -> Tensor:
    shape = (q.shape[0], q.shape[2], q_slots.shape[0] // unit, k_slots.shape[0] // unit)
    return q.new_empty(shape, dtype=torch.float32)
