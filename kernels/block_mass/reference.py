"""The mass in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of logits held at once


def mass(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, key_bias: Tensor | None
) -> Tensor:
    """Attend a few query units at a time, in fp32; shapes as in `block_mass`."""
    b, s, h, _ = k.shape
    units = len(k_slots) // unit
    owner = torch.full((s + 1,), units, device=k.device)  # the last is where holes point to
    owner[torch.where(k_slots < 0, s, k_slots).long()] = torch.arange(len(k_slots), device=k.device) // unit
    owner = owner[:s]
    gather = torch.zeros(s, units + 1, device=k.device).scatter_(1, owner[:, None], 1.0)[:, :units]
    away = torch.zeros(s, device=k.device).masked_fill(owner == units, float("-inf"))
    if key_bias is not None:
        away = away + key_bias[:, :, None]
    keys = k.permute(0, 2, 3, 1).float()
    out = [torch.zeros(b, h, 0, units, device=k.device)]
    for part in q_slots.view(-1, unit).split(max(1, BYTES // (4 * b * h * s * unit))):
        hole = part < 0
        queries = q[:, part.clamp(min=0).long().flatten()].transpose(1, 2).float()
        share = ((queries @ keys * scale + away).softmax(-1) @ gather).unflatten(2, part.shape)
        share = share.masked_fill(hole[..., None], 0)
        out.append(share.sum(3) / (~hole).sum(-1).clamp(min=1)[:, None])
    return torch.cat(out, 2)
