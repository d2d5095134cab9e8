"""Layer norm, scale and shift in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def modulated(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Run torch's operations one after the other; arguments as in `ada_norm`."""
    normed = F.layer_norm(x, x.shape[2:], weight, bias, eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).contiguous()
