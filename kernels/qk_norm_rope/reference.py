"""Norm and rotation in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .api import Norm, Part


def norm_rope(
    parts: Sequence[Part], norm: Norm, cos: Tensor | None, sin: Tensor | None, start: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Normalise, join and rotate, in float32 (float64 of float64) between roundings; arguments as in `qk_norm_rope`."""
    q = torch.cat([_normalised(part.q, part.q_weight, part.q_bias, norm) for part in parts], 1)
    k = torch.cat([_normalised(part.k, part.k_weight, part.k_bias, norm) for part in parts], 1)
    if cos is not None and sin is not None:
        for x in (q, k):
            _rotate(x[:, start : start + cos.shape[0]], cos, sin, interleaved)
    return q, k


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> Tensor:
    over = (2, 3) if norm.across_heads else (3,)
    y = x.to(_compute(x))
    if norm.kind == "layer":
        y = y - y.mean(over, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(over, keepdim=True) + norm.eps)
    if norm.rounds_first:
        y = y.to(x.dtype)
    shape = x.shape[2:] if norm.across_heads else x.shape[3:]
    if weight is not None:
        y = y * weight.view(shape).to(y.dtype)
    if bias is not None:
        y = y + bias.view(shape).to(y.dtype)
    return y.to(x.dtype).contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotate tokens [B, R, H, D] where they lie."""
    first, second = _members(x, interleaved)
    a, b = first.to(_compute(x)), second.to(_compute(x))
    (cos_a, cos_b), (sin_a, sin_b) = (
        _members(table[:, None], interleaved) if table.shape[1] == x.shape[3] else (table[:, None],) * 2
        for table in (cos, sin)
    )
    turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b  # both, before either is written
    first.copy_(turned[0])
    second.copy_(turned[1])


def _members(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second channel of each pair."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
