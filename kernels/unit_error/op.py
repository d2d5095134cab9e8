"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::unit_error",
    mutates_args=(),
    schema="(Tensor queries, Tensor k, Tensor v, Tensor slots, Tensor bounds, int block, "
    "Tensor means_v, float scale, str? backend) -> Tensor",
)
def error_op(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    bounds: Tensor,
    block: int,
    means_v: Tensor,
    scale: float,
    backend: Any,
) -> Tensor:
    """Run `unit_error` from compiled code."""
    from .api import unit_error  # which imports this file

    return unit_error(queries, k, v, slots, bounds, block, means_v, scale, backend=backend)


@error_op.register_fake
def _(queries: Tensor, k: Tensor, v: Tensor, slots: Tensor, bounds: Tensor, *_: Any) -> Tensor:
    return queries.new_empty((*queries.shape[:3], bounds.shape[2] - 1))
