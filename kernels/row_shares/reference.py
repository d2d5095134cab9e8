"""The shares in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def units(logits: Tensor, slots: Tensor | None, unit: int, scale: float, bias: Tensor | None) -> Tensor:
    """Add up the softmax of each row by unit; shapes as in `unit_shares`."""
    share = _softmax(logits, scale, bias)
    if slots is not None:
        share = share[..., slots.clamp(min=0).long()].masked_fill(slots < 0, 0)
    return share.unflatten(-1, (-1, unit)).sum(-1)


def keys(logits: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Add up the softmax of all rows; shapes as in `key_shares`."""
    return _softmax(logits, scale, bias).sum(2)


def _softmax(logits: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    logits = logits * scale
    if bias is not None:
        logits = logits + bias.float()[:, :, None]
    return torch.softmax(logits, -1)
