"""What stands in the holes of slots where a kernel's loop should need no mask."""

from __future__ import annotations

import torch
from torch import Tensor


def repeated(slots: Tensor, unit: int) -> Tensor:
    """Put a token of its unit into every hole of int32 [units * unit]; the first token where a unit has none."""
    by_unit = slots.view(-1, unit)
    return torch.where(by_unit < 0, by_unit.amax(1, keepdim=True), by_unit).clamp(min=0).flatten()


def by_slot(bias: Tensor, slots: Tensor) -> Tensor:
    """Lay what tokens add to their logits, [B|1, H|1, S], into slots: float32, -inf in a hole."""
    return bias.float()[:, :, slots.clamp(min=0).long()].masked_fill(slots < 0, float("-inf"))
