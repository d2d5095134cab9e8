"""The operations as torch.compile sees them: opaque, with fake implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::unit_shares",
    mutates_args=(),
    schema="(Tensor logits, Tensor? slots, int unit, float scale, Tensor? bias, str? backend) -> Tensor",
)
def units_op(
    logits: Tensor, slots: Tensor | None, unit: int, scale: float, bias: Tensor | None, backend: Any
) -> Tensor:
    """Run `unit_shares` from compiled code."""
    from .api import unit_shares  # which imports this file

    return unit_shares(logits, slots, unit, scale, bias, backend=backend)


@units_op.register_fake
def _(logits: Tensor, slots: Tensor | None, unit: int, *_: Any) -> Tensor:
    length = logits.shape[3] if slots is None else slots.shape[0]
    return logits.new_empty((*logits.shape[:3], length // unit))


@torch.library.custom_op(
    "dit_accel::key_shares",
    mutates_args=(),
    schema="(Tensor logits, float scale, Tensor? bias, str? backend) -> Tensor",
)
def keys_op(logits: Tensor, scale: float, bias: Tensor | None, backend: Any) -> Tensor:
    """Run `key_shares` from compiled code."""
    from .api import key_shares  # which imports this file

    return key_shares(logits, scale, bias, backend=backend)


@keys_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    b, h, _, n = logits.shape
    return logits.new_empty((b, h, n))
