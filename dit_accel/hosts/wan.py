"""Wan 2.1 and 2.2, text and image to video: video tokens alone, cross-attention to text and picture beside them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..call import Site
from ..layout import TokenLayout
from ..origin import Origin
from ..seat import Seat
from .family import CrossAttention, Family, Host
from .geometry import Arguments, video
from .norm_rope import Projected, Rotary, Rotation
from .own import answer, dispatch, projected, run_dense, run_sparse

_TEXT_TOKENS = 512  # WanAttnProcessor takes what lies before these as the picture's tokens


def geometry(transformer: torch.nn.Module, arguments: Arguments, _: dict[str, Any]) -> TokenLayout:
    """Read the grid from the latents [B, C, F, H, W]; a conditioning picture lies in their channels."""
    return TokenLayout([video(transformer, arguments)])


def attention(
    original: Any,
    host: Host | Seat,
    site: Site,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    rotary_emb: Rotary = None,
) -> Any:
    """Stand in for WanAttnProcessor in self-attention: `hidden_states` [B, S, C] in and out."""
    stock = partial(original, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
    reason = host.dense_reason(site, hidden_states, hidden_states.shape[1])
    if not reason and (encoder_hidden_states is not None or attention_mask is not None):
        reason = "the call is no plain self-attention"
    if reason:
        return run_dense(host, site, hidden_states, reason, stock)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in projected(attn, hidden_states, fused=_fused(attn)))
    parts = [Projected(q, k, v, attn.norm_q, attn.norm_k, across_heads=True)]
    out = run_sparse(host, site, parts, ROTATION, rotary_emb, partial(dispatch, original))
    return _project_out(attn, out)


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate neighbouring channels of x [B, S, H, D] by (cos, sin) [1, S, 1, D]."""
    if rotary is None:
        return x
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _tables(rotary: tuple[torch.Tensor, torch.Tensor], _: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The values that `_rotate` takes, by pair [S, D / 2]."""
    cos, sin = (table.squeeze((0, 2)) for table in rotary)
    return cos[..., 0::2], sin[..., 1::2], 0


ROTATION = Rotation(_rotate, _tables)


def cross_attention(
    original: Any,
    host: Host | Seat,
    site: Site,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    rotary_emb: Rotary = None,
) -> Any:
    """Stand in for WanAttnProcessor in cross-attention: its arithmetic, with text and picture K/V kept for the run.

    `hidden_states` [B, S, C], `encoder_hidden_states` [B, (picture +) text, C].
    """
    traced = isinstance(host, Seat)  # what is kept may not enter compiled code, so there stock computes it
    if traced or host.prompt is None or encoder_hidden_states is None or rotary_emb is not None:
        return original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
    make = partial(_text_kv, attn, encoder_hidden_states)
    kept = host.engine.text_kv.get(site, host.step, host.prompt.through(*_kv_modules(attn)), make)
    q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
    out = _dense(original, q, kept[0], kept[1], attention_mask)
    if len(kept) > 2:
        out = out + _dense(original, q, kept[2], kept[3])
    return _project_out(attn, out)


def _kv_modules(attn: Any) -> list[torch.nn.Module | None]:
    names = ("to_kv", "to_added_kv") if _fused(attn) else ("to_k", "to_v", "add_k_proj", "add_v_proj")
    return [getattr(attn, name, None) for name in (*names, "norm_k", "norm_added_k")]


def _text_kv(attn: Any, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return k, v of the text, and k, v of the picture where the model has them, each [B, tokens, H, D]."""
    fused, parts = _fused(attn), []
    if attn.add_k_proj is not None:
        cut = words.shape[1] - _TEXT_TOKENS
        picture, words = words[:, :cut], words[:, cut:]
        parts = _pair(picture, attn.to_added_kv if fused else (attn.add_k_proj, attn.add_v_proj), attn.norm_added_k)
    parts = [*_pair(words, attn.to_kv if fused else (attn.to_k, attn.to_v), attn.norm_k), *parts]
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in parts)


def _pair(x: torch.Tensor, projection: Any, norm: Any) -> list[torch.Tensor]:
    """Project to normalised keys and values, by two matrices or by one where the user has fused them."""
    k, v = (part(x) for part in projection) if isinstance(projection, tuple) else projection(x).chunk(2, -1)
    return [norm(k), v]


def _dense(
    original: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    return dispatch(original, q, k, v, mask).flatten(2, 3).type_as(q)


def _fused(attn: Any) -> bool:
    return getattr(attn, "fused_projections", False)


def _project_out(attn: Any, out: torch.Tensor) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](out))


def prompt(transformer: Any, arguments: Arguments) -> Origin:
    """Return what all text keys and values of one call are computed from, the cross-attentions' weights aside."""
    names = ("encoder_hidden_states", "encoder_hidden_states_image")
    given = tuple(x for name in names if isinstance(x := arguments.get(name), torch.Tensor))
    embedder = transformer.condition_embedder
    return Origin(given).through(embedder.text_embedder, embedder.image_embedder)


WAN = Family(
    name="wan",
    classes=("WanTransformer3DModel",),
    sites=r"(blocks)\.\d+\.attn1",
    geometry=geometry,
    processors=("WanAttnProcessor",),
    attention=attention,
    answer=partial(answer, _rotate),
    cross=CrossAttention(sites=r"(blocks)\.\d+\.attn2", attention=cross_attention, prompt=prompt),
)
