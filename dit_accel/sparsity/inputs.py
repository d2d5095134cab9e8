"""What a decision is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from .cached import Reference
from .content import Centroids

Warm = Centroids | Reference  # what a decision may start from, of the same run, site, branch and samples


@dataclass(frozen=True, eq=False)
class Inputs:
    """`q`, `k`, `v` [B, S, H, D] of one call, their scale, a bias on the keys, and what the last decision left."""

    layout: TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    warm: Warm | None = None

    def of_heads(self, at: torch.Tensor) -> Inputs:
        """Return the inputs of some heads, int64 [heads]."""
        q, k, v = (x.index_select(2, at) for x in (self.q, self.k, self.v))
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = bias.index_select(1, at)
        return Inputs(self.layout, q, k, v, self.scale, bias)
