"""Top-p in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(score: Tensor, keep: Tensor, p: float, least: float | Tensor) -> Tensor:
    """Take each row's best pairs; shapes as in `top_mass`."""
    order, before = mass_before(score)
    taken = (before < p) | first(before, least)
    mask = torch.zeros_like(taken).scatter_(-1, order, taken)
    return mask | keep | ~torch.isfinite(score)


def mass_before(score: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's columns, best first, and the share of the row's score that lies before each of them."""
    mass = torch.where(torch.isfinite(score), score, 0).clamp(min=0)
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ordered = mass.gather(-1, order)
    return order, ordered.cumsum(-1) - ordered


def first(ordered: Tensor, least: float | Tensor) -> Tensor:
    """Mark the first `least` of the columns, rounded down."""
    share = least * ordered.shape[-1]
    count = share.long() if isinstance(share, Tensor) else int(share)
    return (torch.arange(ordered.shape[-1], device=ordered.device) < count).expand_as(ordered)
