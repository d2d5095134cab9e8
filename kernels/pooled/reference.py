"""Pooled attention in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.bits import as_mask

BYTES = 256 << 20  # of logits held at once


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, computed: Tensor, row: Tensor, scale: float, first: int
) -> tuple[Tensor, Tensor]:
    """Attend a few queries at a time; shapes as in `pooled_attention`. Arithmetic is fp32 (fp64 for fp64 inputs)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, s, h, _ = q.shape
    groups = bias.shape[2]
    keys, values = k[:, :, :groups].to(compute).mT * scale, v[:, :, :groups].to(compute)
    weigh = bias.to(compute)[:, :, None]
    seen = left(computed, first, groups).expand(b, h, -1, -1)
    outs, lses = [], []
    for part in torch.arange(s, device=q.device).split(max(1, BYTES // (4 * b * h * groups))):
        at = row[..., part].expand(b, h, -1)[..., None].expand(-1, -1, -1, groups)
        logits = q[:, part].transpose(1, 2).to(compute) @ keys + weigh
        visible = seen.gather(2, at) & torch.isfinite(weigh)
        logits = logits.masked_fill(~visible, float("-inf"))
        lse = logits.logsumexp(-1)
        weights = (logits - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
        outs.append((weights @ values).transpose(1, 2))
        lses.append(lse.float())
    return torch.cat(outs, 1).to(q.dtype), torch.cat(lses, 2)


def left(computed: Tensor, first: int, groups: int) -> Tensor:
    """What is not computed of the groups, bool [B|1, H|1, R, groups]."""
    return ~as_mask(computed)[..., first : first + groups]
