"""The descent in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of keys and products held at once


def best(queries: Tensor, k: Tensor, slots: Tensor, unit: int) -> Tensor:
    """Search a few groups at a time, in fp32; shapes as in `descend`."""
    b, h, _, asking, d = queries.shape
    keys = k[:, slots.clamp(min=0).long()].transpose(1, 2).float()
    tokens = (slots >= 0).view(-1, unit).sum(-1)
    parts = queries.float().split(max(1, BYTES // (4 * b * h * max(len(tokens), 1) * (d + asking))), 2)
    return torch.cat([_descended(part, keys, tokens, unit) for part in parts], 2)


def _descended(queries: Tensor, keys: Tensor, tokens: Tensor, unit: int) -> Tensor:
    """Return the largest product met on the way down each unit, [B, H, groups, units].

    `keys` [B, H, units * unit, D], `tokens` int64 [units], the real ones of each unit, which come first.
    """
    shape = (*queries.shape[:3], len(tokens))
    start = torch.arange(len(tokens), device=keys.device) * unit

    def met(at: Tensor) -> Tensor:
        index = (start + at).flatten(2)[..., None].expand(-1, -1, -1, keys.shape[-1])
        picked = keys.gather(2, index).unflatten(2, shape[2:])
        return (queries @ picked.mT).amax(3)

    low, high = torch.zeros(shape, dtype=torch.int64, device=keys.device), tokens.expand(shape)
    best = torch.full(shape, float("-inf"), device=keys.device)
    for _ in range((unit - 1).bit_length()):
        middle = (low + high) // 2
        left, right = met((low + middle) // 2), met((middle + high) // 2)
        best = torch.maximum(best, torch.maximum(left, right))
        low, high = torch.where(left > right, low, middle), torch.where(left > right, middle, high)
    return best
