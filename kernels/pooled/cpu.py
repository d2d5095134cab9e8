"""Pooled attention by torch's fused CPU attention, the groups of each query's row as a mask of the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 26  # of the mask's elements at once: bounds memory


def attend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend some queries at a time; shapes as in `pooled_attention`. Mean keys and values are rounded to q's dtype."""
    b, s, h, _ = q.shape
    keys, values = k.to(q.dtype), v.to(q.dtype)
    weigh = tokens.double().log().to(q.dtype)[:, :, None].expand(b, h, 1, -1)  # no tokens: -inf
    logits = weigh.masked_fill(~allowed, -math.inf)
    nothing = (logits == -math.inf).all(-1)
    row, outs, lses = row.expand(b, h, s), [], []
    for part in torch.arange(s).split(max(1, CHUNK // max(1, b * h * k.shape[2]))):
        at = row[..., part]
        mask = logits.gather(2, at[..., None].expand(-1, -1, -1, k.shape[2]))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, part].transpose(1, 2), keys, values, attn_mask=mask, scale=scale
        )
        unseen = nothing.gather(2, at)
        outs.append(out.masked_fill(unseen[..., None], 0).transpose(1, 2))
        lses.append(lse.masked_fill(unseen, -math.inf).float())
    return torch.cat(outs, 1), torch.cat(lses, 2)
