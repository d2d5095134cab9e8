"""Pooled attention by torch's fused CPU attention, the groups of each query's row as a mask of the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import left

CHUNK = 1 << 26  # of the mask's elements at once: bounds memory


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, computed: Tensor, row: Tensor, scale: float, first: int
) -> tuple[Tensor, Tensor]:
    """Attend some queries at a time; shapes as in `pooled_attention`. Mean keys and values are rounded to q's dtype."""
    b, s, h, _ = q.shape
    groups = bias.shape[2]
    keys, values = k[:, :, :groups].to(q.dtype), v[:, :, :groups].to(q.dtype)
    weigh = bias.to(q.dtype)[:, :, None].expand(b, h, 1, -1)
    logits = weigh.masked_fill(~left(computed, first, groups), -math.inf)
    nothing = (logits == -math.inf).all(-1)
    row, outs, lses = row.expand(b, h, s), [], []
    for part in torch.arange(s).split(max(1, CHUNK // max(1, b * h * groups))):
        at = row[..., part]
        mask = logits.gather(2, at[..., None].expand(-1, -1, -1, groups))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, part].transpose(1, 2), keys, values, attn_mask=mask, scale=scale
        )
        unseen = nothing.gather(2, at)
        outs.append(out.masked_fill(unseen[..., None], 0).transpose(1, 2))
        lses.append(lse.masked_fill(unseen, -math.inf).float())
    return torch.cat(outs, 1), torch.cat(lses, 2)
