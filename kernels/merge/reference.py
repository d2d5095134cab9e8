"""The merge in plain torch: the definition of right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weigh the branches by their share of the softmax sum, in fp32 (fp64 for fp64 outs)."""
    compute = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(compute) for lse in lses])  # [N, B, H, S]
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse.masked_fill(lse == -math.inf, 0.0))
    merged = torch.zeros(outs[0].shape, dtype=compute, device=outs[0].device)
    for out, weight, own in zip(outs, weights, stacked, strict=True):
        # a weight of zero does not silence a NaN, so a branch without keys is left out by hand
        silent = (own == -math.inf).transpose(1, 2).unsqueeze(-1)  # [B, S, H, 1]
        merged += (out.to(compute) * weight.transpose(1, 2).unsqueeze(-1)).masked_fill(silent, 0.0)
    return merged.to(outs[0].dtype), lse.float()
