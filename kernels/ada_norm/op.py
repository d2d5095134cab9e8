"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::ada_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? weight, Tensor? bias, str? backend) -> Tensor",
)
def ada_norm_op(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, backend: Any
) -> Tensor:
    """Run `ada_norm` from compiled code, or count it on no device."""
    from .api import ada_norm  # which imports this file

    return ada_norm(x, scale, shift, eps, weight, bias, backend=backend)


@ada_norm_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
