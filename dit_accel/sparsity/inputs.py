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
