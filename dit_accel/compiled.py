"""An attention call in compiled code: one opaque operation, behind which everything is as in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .seat import seat_of


@torch.library.custom_op(
    "dit_accel::attend",
    mutates_args=(),
    schema="(Tensor site, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor[] raw) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # a replayed graph would not ask the host which step it is
)
def attend(
    site: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    raw: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Run one attention call of an accelerated model from compiled code.

    `site` int64 scalar on the CPU, the number of a `Seat`; `q`, `k`, `v` [B, S, H, D] rotated; `mask` as the stock
    processor gets it; `raw` is q and k before rotation and what rotates them, while there are stages, else empty.
    Returns [B, S, H, D], contiguous, in q's dtype. Raises KeyError for a model that is gone.
    """
    seat = seat_of(site)
    assert seat.host.family.answer is not None  # it has an `attention`, else nothing was traced to here
    out = seat.host.family.answer(seat.original, seat.host, seat.site, q, k, v, mask, raw)
    return out.to(q.dtype).contiguous()


@attend.register_fake
def _(
    site: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    raw: Sequence[torch.Tensor],
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "dit_accel::sdpa",
    mutates_args=(),
    schema="(Tensor site, Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def sdpa(
    site: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Run one scaled-dot-product attention of a processor that the generic host has traced.

    `site` as in `attend`, all else as torch's function takes it, [B, H, S, D] in and out; the memory of the result is
    [B, S, H, D]. Raises KeyError for a model that is gone.
    """
    from .hosts.generic import answer  # which imports this file

    seat = seat_of(site)
    out = answer(
        seat.host,
        seat.site,
        {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": attn_mask,
            "dropout_p": dropout_p,
            "is_causal": is_causal,
            "scale": scale,
            "enable_gqa": enable_gqa,
        },
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@sdpa.register_fake
def _(
    site: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    batch, heads, length, _dim = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
