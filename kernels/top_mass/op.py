"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::top_mass",
    mutates_args=(),
    schema="(Tensor score, Tensor keep, float p, float least, Tensor? by_head, str? backend) -> Tensor",
)
def mass_op(score: Tensor, keep: Tensor, p: float, least: float, by_head: Tensor | None, backend: Any) -> Tensor:
    """Run `top_mass` from compiled code; the one number counts where there are none by head."""
    from .api import top_mass  # which imports this file

    return top_mass(score, keep, p, least if by_head is None else by_head, backend=backend)


@mass_op.register_fake
def _(score: Tensor, *_: Any) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)
