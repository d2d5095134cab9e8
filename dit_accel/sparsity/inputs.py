"""What a decision is made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from .content import Centroids


@dataclass(frozen=True, eq=False)
class Inputs:
    """`q`, `k`, `v` [B, S, H, D] of one call, their scale, a bias on the keys, and the run's last centroids."""

    layout: TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    warm: Centroids | None = None
