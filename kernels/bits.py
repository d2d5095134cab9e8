"""A mask at rest, one bit for each of its places."""

from __future__ import annotations

import torch
from torch import Tensor


def as_mask(mask: Tensor) -> Tensor:
    """Return a mask as bool [..., n] that may be as bits, uint8 [..., n / 8], the lowest first; spare ones stay."""
    if mask.dtype == torch.bool:
        return mask
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return ((mask[..., None] >> shifts) & 1).bool().flatten(-2)
