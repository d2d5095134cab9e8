"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::merge_attention",
    mutates_args=(),
    schema="(Tensor[] outs, Tensor[] lses, str? backend) -> (Tensor, Tensor)",
)
def merge_op(outs: Sequence[Tensor], lses: Sequence[Tensor], backend: Any) -> tuple[Tensor, Tensor]:
    """Run `merge_attention` from compiled code."""
    from .api import merge_attention  # which imports this file

    out, lse = merge_attention(outs, lses, backend=backend)
    return out.contiguous(), lse.contiguous()


@merge_op.register_fake
def _(outs: Sequence[Tensor], lses: Sequence[Tensor], backend: Any) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)
