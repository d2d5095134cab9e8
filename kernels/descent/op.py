"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::descend",
    mutates_args=(),
    schema="(Tensor queries, Tensor k, Tensor slots, int unit, str? backend) -> Tensor",
)
def descend_op(queries: Tensor, k: Tensor, slots: Tensor, unit: int, backend: Any) -> Tensor:
    """Run `descend` from compiled code."""
    from .api import descend  # which imports this file

    return descend(queries, k, slots, unit, backend=backend)


@descend_op.register_fake
def _(queries: Tensor, k: Tensor, slots: Tensor, unit: int, backend: Any) -> Tensor:
    return queries.new_empty((*queries.shape[:3], slots.shape[0] // unit), dtype=torch.float32)
