"""The operations as torch.compile sees them: opaque, with fake implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::fill_rows",
    mutates_args=(),
    schema="(Tensor score, Tensor keep, Tensor cost, float share, Tensor? budget, str? backend) -> Tensor",
)
def rows_op(score: Tensor, keep: Tensor, cost: Tensor, share: float, budget: Tensor | None, backend: Any) -> Tensor:
    """Run `fill_rows` from compiled code; the share counts where there is no budget."""
    from .api import fill_rows  # which imports this file

    return fill_rows(score, keep, cost, share if budget is None else budget, backend=backend)


@torch.library.custom_op(
    "dit_accel::fill_heads",
    mutates_args=(),
    schema="(Tensor score, Tensor keep, Tensor row_cost, Tensor col_cost, float share, str? backend) -> Tensor",
)
def heads_op(score: Tensor, keep: Tensor, row_cost: Tensor, col_cost: Tensor, share: float, backend: Any) -> Tensor:
    """Run `fill_heads` from compiled code."""
    from .api import fill_heads

    return fill_heads(score, keep, row_cost, col_cost, share, backend=backend)


@rows_op.register_fake
@heads_op.register_fake
def _(score: Tensor, *_: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)
