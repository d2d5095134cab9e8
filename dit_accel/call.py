"""What is known of one attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .layout import TokenLayout
from .step import StepInfo


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of one transformer. `index` counts the sites of the transformer from 0, up to `count`.

    `model` tells transformers of one pipeline apart.
    """

    name: str
    group: str
    index: int
    module: Any  # a torch module with a `processor`
    count: int = 1
    model: str = ""


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Everything known about one attention call.

    `q`, `k`, `v` [B, S, H, D] with whatever strides they have, rotated. `stock` runs the attention the user has
    configured on such tensors. `key_bias` [B|1, H|1, keys] holds the padding (-inf). `q_raw`, `k_raw` are the
    tensors before rotation and `rotate` turns them, where the host can give them.
    """

    site: Site
    step: StepInfo
    layout: TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    stock: Attention
    key_bias: torch.Tensor | None = None
    q_raw: torch.Tensor | None = None
    k_raw: torch.Tensor | None = None
    rotate: Callable[[torch.Tensor], torch.Tensor] | None = None


Stage = Callable[[AttentionCall], AttentionCall]
