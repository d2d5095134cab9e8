"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::block_lists",
    mutates_args=(),
    schema="(Tensor units, Tensor q_owner, Tensor k_owner, Tensor q_tokens, Tensor k_tokens, int block_k, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def lists_op(
    units: Tensor, q_owner: Tensor, k_owner: Tensor, q_tokens: Tensor, k_tokens: Tensor, block_k: int, backend: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `block_lists` from compiled code."""
    from .api import block_lists  # which imports this file

    made = block_lists(units, q_owner, k_owner, q_tokens, k_tokens, block_k, backend=backend)
    return made.index, made.count, made.full_count, made.pairs


@lists_op.register_fake
def _(
    units: Tensor, q_owner: Tensor, k_owner: Tensor, q_tokens: Tensor, k_tokens: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h = torch.broadcast_shapes(units.shape[:2], q_owner.shape[:2], k_owner.shape[:2])
    rows = (b, h, q_owner.shape[2])
    index = units.new_empty(*rows, k_owner.shape[2], dtype=torch.int32)
    count = units.new_empty(rows, dtype=torch.int32)
    return index, count, count.new_empty(rows), units.new_empty(rows, dtype=torch.int64)
