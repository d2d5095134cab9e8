"""The largest products in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of logits held at once


def largest(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    biases: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Multiply a few query units at a time, in fp32; shapes as in `block_max`."""
    b, s, h, _ = k.shape
    units = len(k_slots) // unit
    answers = k_slots.clamp(min=0).long().view(units, unit)
    away = (k_slots < 0).view(units, unit)
    keys = k.permute(0, 2, 3, 1).float()
    out = [torch.zeros(b, h, 0, units, device=k.device)]
    for part in q_slots.view(-1, unit).split(max(1, BYTES // (4 * b * h * s * unit))):
        asking = part.clamp(min=0).long().flatten()
        logits = q[:, asking].transpose(1, 2).float() @ keys * scale
        if biases is not None:
            logits = logits + biases[0][:, :, asking, None] + biases[1][:, :, None]
        logits = logits.unflatten(2, part.shape)
        best = logits.masked_fill((part < 0)[..., None], float("-inf")).amax(3)
        out.append(best[..., answers].masked_fill(away, float("-inf")).amax(-1))
    return torch.cat(out, 2)
