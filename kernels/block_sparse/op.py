"""The operation as torch.compile sees it: opaque, with a fake implementation, its arguments flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Predicate


@torch.library.custom_op(
    "dit_accel::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, int block_q, int block_k, Tensor? full_count, "
    "Tensor? q_order, Tensor? k_order, Tensor? key_bias, bool all_full, str kind, int[] radius, Tensor? q_coords, "
    "Tensor? k_coords, float? scale, bool every_query, bool pack, str precision, str? backend) -> (Tensor, Tensor)",
)
def block_sparse_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    full_count: Tensor | None,
    q_order: Tensor | None,
    k_order: Tensor | None,
    key_bias: Tensor | None,
    all_full: bool,
    kind: str,
    radius: Sequence[int],
    q_coords: Tensor | None,
    k_coords: Tensor | None,
    scale: float | None,
    every_query: bool,
    pack: bool,
    precision: Any,
    backend: Any,
) -> tuple[Tensor, Tensor]:
    """Run `block_sparse_attention` from compiled code.

    `all_full` stands for "`full_count` is `count`"; `kind` ('' is none), `radius` and the coordinates for a Predicate.
    """
    from .api import block_sparse_attention  # which imports this file

    rule: Any = Predicate  # checked behind the door
    predicate = rule(kind, tuple(radius), q_coords, k_coords) if kind else None
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        index,
        count,
        block_q=block_q,
        block_k=block_k,
        full_count=count if all_full else full_count,
        q_order=q_order,
        k_order=k_order,
        key_bias=key_bias,
        predicate=predicate,
        scale=scale,
        every_query=every_query,
        pack=pack,
        precision=precision,
        backend=backend,
    )
    return out.contiguous(), lse.contiguous()


@block_sparse_op.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _dim = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=torch.float32)


def traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    block_q: int,
    block_k: int,
    full_count: Tensor | None,
    q_order: Tensor | None,
    k_order: Tensor | None,
    key_bias: Tensor | None,
    predicate: Predicate | None,
    scale: float | None,
    every_query: bool,
    pack: bool,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Call the operation with the arguments of `block_sparse_attention`, which it checks when it runs."""
    shape = ("", [0, 0, 0], None, None)
    if predicate is not None:
        shape = (predicate.kind, list(predicate.radius), predicate.q_coords, predicate.k_coords)
    all_full = full_count is count
    lists = (None if all_full else full_count, q_order, k_order, key_bias, all_full)
    how = (scale, every_query, pack, precision, backend)
    return block_sparse_op(q, k, v, index, count, block_q, block_k, *lists, *shape, *how)
