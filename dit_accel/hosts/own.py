"""What hosts with a processor of their own share: the dense way out, and the call handed to the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import compiled
from ..attend import attend
from ..call import Attention, AttentionCall, Site
from ..layout import TokenLayout
from ..seat import Seat
from .family import Host
from .norm_rope import QKV, Projected, Rotary, Rotate, Rotation, from_the_first, fused, normalised

Raw = Sequence[torch.Tensor]  # q and k before rotation and what rotates them, as `compiled.attend` takes them


def run_dense(host: Host | Seat, site: Site, x: torch.Tensor, reason: str, stock: Callable[[], Any]) -> Any:
    """Let the original processor run the call as it came, and write down why."""
    if isinstance(host, Seat):
        host.inlined = reason
        return stock()
    with host.engine.ledger.timed_dense(site, host.step, x.device, reason):
        return stock()


def run_sparse(
    host: Host | Seat,
    site: Site,
    parts: Sequence[Projected],
    rotation: Rotation,
    rotary: Rotary,
    dense: Attention,
    layout: TokenLayout | None = None,
    key_bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise, join and rotate what was projected, hand it to the engine, return [B, S, H * D] in q's dtype.

    `dense` runs stock attention on such tensors. `layout` is that of these tokens, where it is not the whole
    sequence's; `key_bias` [B|1, H|1, S] masks padding. `mask` is what stock would be given: compiled code hands it on,
    and it is looked at when the call runs. Norm and rotation are one pass where they can be, unless stages want the
    tokens before rotation, or inductor, which fuses them itself, is at work.
    """
    if not isinstance(host, Seat) and not host.engine.stages:
        turned = fused(parts, rotation, rotary)
        if turned is not None:
            return engage(host, site, turned, None, dense, layout, key_bias).flatten(2, 3)
    q, k, v = normalised(parts)
    rotate = rotation.turn
    turned = (rotate(q, rotary), rotate(k, rotary), v)
    if isinstance(host, Seat):
        raw = [q, k, *(rotary or ())] if host.engine.stages else []
        return compiled.attend(host.number, *turned, mask, raw).flatten(2, 3)
    return engage(host, site, turned, (q, k, partial(rotate, rotary=rotary)), dense, layout, key_bias).flatten(2, 3)


def engage(
    host: Host,
    site: Site,
    qkv: QKV,
    raw: tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None,
    dense: Attention,
    layout: TokenLayout | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hand rotated q, k, v to the engine, [B, S, H, D] in and out; `raw` is q, k and how to rotate them."""
    layout = layout or host.layout
    assert layout is not None  # without one, dense_reason has sent the call away
    q, k, v = qkv
    q_raw, k_raw, rotate = raw or (None, None, None)
    call = AttentionCall(
        site=site,
        step=host.step,
        layout=layout,
        q=q,
        k=k,
        v=v,
        scale=q.shape[-1] ** -0.5,
        stock=dense,
        key_bias=key_bias,
        q_raw=q_raw,
        k_raw=k_raw,
        rotate=rotate,
    )
    return attend(call, host.engine).to(q.dtype)


def answer(
    rotate: Rotate,
    original: Any,
    host: Host,
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    raw: Raw,
) -> torch.Tensor:
    """Carry out an attention call of compiled code, with the arguments of `compiled.attend`, [B, S, H, D] in and out.

    A dense call is the attention that stock would run on the same q, k and v.
    """
    reason = host.dense_reason(site, q, q.shape[1])
    if reason:
        stock = partial(dispatch, original, q, k, v, mask, getattr(original, "_parallel_config", None))
        return run_dense(host, site, q, reason, stock)
    return engage(host, site, (q, k, v), unrotated(rotate, raw), partial(dispatch, original))


def unrotated(rotate: Rotate, raw: Raw) -> Any:
    """Return what `engage` wants as `raw` from that of `compiled.attend`."""
    if not raw:
        return None
    rotary = (raw[2], raw[3]) if len(raw) > 2 else None
    return raw[0], raw[1], partial(rotate, rotary=rotary)


def dispatch(
    original: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    parallel: Any = None,
) -> torch.Tensor:
    """Run dense attention through whatever backend the user has set on the processor, [B, S, H, D] in and out.

    Split over devices only where `parallel` says how: eager code leaves self-attention to the stock processor under
    context parallelism, and cross-attention, whose text every device holds whole, is not split by stock either.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend = original._attention_backend
    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)


def rotate_pairs(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotate x [B, S, H, D] by (cos, sin) [S, D], neighbouring channels being one pair."""
    from diffusers.models.embeddings import apply_rotary_emb

    if rotary is None:
        return x
    embed: Any = apply_rotary_emb  # its annotation knows one of the two forms it takes
    return embed(x, rotary, sequence_dim=1)


PAIRS = Rotation(rotate_pairs, from_the_first)


def projected(attn: Any, x: torch.Tensor, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Project to q, k, v [B, S, C], through one matrix where the user has fused them."""
    if fused:
        q, k, v = attn.to_qkv(x).chunk(3, -1)
        return q, k, v
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)
