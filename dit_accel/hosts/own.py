"""What hosts with a processor of their own share: the dense way out, and the call handed to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attend import attend
from ..call import Attention, AttentionCall, Site
from ..layout import TokenLayout
from .family import Host


def run_dense(host: Host, site: Site, x: torch.Tensor, reason: str, stock: Callable[[], Any]) -> Any:
    """Let the original processor run the call as it came, and write down why."""
    with host.engine.ledger.timed_dense(site, host.step, x.device, reason):
        return stock()


def run_sparse(
    host: Host,
    site: Site,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotate: Callable[[torch.Tensor], torch.Tensor],
    dense: Attention,
    layout: TokenLayout | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hand unrotated q, k, v [B, S, H, D] to the engine and return [B, S, H * D] in q's dtype.

    `layout` is that of these tokens, where it is not the whole sequence's. `dense` runs stock attention on tensors
    of this form; `key_bias` [B|1, H|1, S] masks padding.
    """
    q, k, v = qkv
    layout = layout or host.layout
    assert layout is not None  # without one, dense_reason has sent the call away
    call = AttentionCall(
        site=site,
        step=host.step,
        layout=layout,
        q=rotate(q),
        k=rotate(k),
        v=v,
        scale=q.shape[-1] ** -0.5,
        stock=dense,
        key_bias=key_bias,
        q_raw=q,
        k_raw=k,
        rotate=rotate,
    )
    return attend(call, host.engine).flatten(2, 3).to(q.dtype)


def dispatch(
    original: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run dense attention through whatever backend the user has set on the processor, [B, S, H, D] in and out.

    Never split over devices: context parallelism leaves self-attention to the stock processor, and cross-attention,
    whose text every device holds whole, is not split by stock either.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=original._attention_backend)


def rotate_pairs(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotate x [B, S, H, D] by (cos, sin) [S, D], neighbouring channels being one pair."""
    from diffusers.models.embeddings import apply_rotary_emb

    if rotary is None:
        return x
    embed: Any = apply_rotary_emb  # its annotation knows one of the two forms it takes
    return embed(x, rotary, sequence_dim=1)


def projected(attn: Any, x: torch.Tensor, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project to q, k, v [B, S, C], through one matrix where the user has fused them."""
    if fused:
        q, k, v = attn.to_qkv(x).chunk(3, -1)
        return q, k, v
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)
