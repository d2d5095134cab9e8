"""Pooled attention in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of logits held at once


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend a few queries at a time; shapes as in `pooled_attention`. Arithmetic is fp32 (fp64 for fp64 inputs)."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, s, h, _ = q.shape
    groups = k.shape[2]
    keys, values = k.to(compute).mT * scale, v.to(compute)
    weigh = tokens.to(compute).log()[:, :, None]  # no tokens: -inf
    seen = allowed.expand(b, h, -1, -1)
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
