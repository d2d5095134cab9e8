"""The operation as torch.compile sees it: opaque, with a fake implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "dit_accel::qk_norm_rope",
    mutates_args=(),
    schema="(Tensor[] q, Tensor[] k, Tensor?[] weights, str kind, float eps, bool across_heads, bool rounds_first, "
    "Tensor? cos, Tensor? sin, int start, bool interleaved, str? backend) -> (Tensor, Tensor)",
)
def norm_rope_op(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    kind: Any,
    eps: float,
    across_heads: bool,
    rounds_first: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    interleaved: bool,
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """Run `qk_norm_rope` from compiled code; `weights` are four a part, in the order of `Part`."""
    from .api import Norm, Part, qk_norm_rope  # which imports this file

    parts = [Part(q[at], k[at], *weights[4 * at : 4 * at + 4]) for at in range(len(q))]
    norm = Norm(kind, eps, across_heads, rounds_first)
    return qk_norm_rope(parts, norm, cos, sin, start=start, interleaved=interleaved, backend=backend)


@norm_rope_op.register_fake
def _(q: Sequence[Tensor], k: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    batch, _length, heads, dim = q[0].shape
    shape = (batch, sum(x.shape[1] for x in q), heads, dim)
    return q[0].new_empty(shape), k[0].new_empty(shape)
