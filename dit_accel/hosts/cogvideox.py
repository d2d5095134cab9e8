"""CogVideoX: [text, video], rotation of the video tokens alone; padded text is attended, as the model was trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..call import Site
from ..layout import Grid, TokenLayout
from ..seat import Seat
from .family import Family, Host
from .geometry import Arguments, latents, patch, text
from .norm_rope import Projected, Rotary, Rotation
from .own import Raw, engage, projected, rotate_pairs, run_dense, run_sparse, unrotated


def geometry(transformer: torch.nn.Module, arguments: Arguments, _: dict[str, Any]) -> TokenLayout:
    """Read the grid from the latents [B, F, C, H, W], frames before channels."""
    _batch, frames, _channels, height, width = latents(arguments, 5)
    pt, ph, pw = patch(transformer)
    return TokenLayout([*text(arguments), Grid(-(-frames // pt), height // ph, width // pw)])


def attention(
    original: Any,
    host: Host | Seat,
    site: Site,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Any:
    """Stand in for CogVideoX's processors, fused or not: video [B, S, C] and text in, (video, text) out."""
    stock = partial(original, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    words = encoder_hidden_states.shape[1]
    reason = host.dense_reason(site, hidden_states, words + hidden_states.shape[1])
    if not reason and attention_mask is not None:
        reason = "the call carries an attention mask"
    if reason:
        return run_dense(host, site, hidden_states, reason, stock)
    joint = torch.cat([encoder_hidden_states, hidden_states], 1)
    q, k, v = projected(attn, joint, fused=type(original).__name__.startswith("Fused"))
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
    parts = [Projected(q, k, v, attn.norm_q, attn.norm_k)]
    out = run_sparse(host, site, parts, ROTATION, image_rotary_emb, _dense)
    out = attn.to_out[1](attn.to_out[0](out))
    return out[:, words:], out[:, :words]


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the video tokens, which come last."""
    if rotary is None:
        return x
    words = x.shape[1] - rotary[0].shape[0]
    return torch.cat([x[:, :words], rotate_pairs(x[:, words:], rotary)], 1)


def _tables(rotary: tuple[torch.Tensor, torch.Tensor], tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    return *rotary, tokens - rotary[0].shape[0]


ROTATION = Rotation(_rotate, _tables, partly=True)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """CogVideoX's processors know no other backend than torch's."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _answer(
    _: Any, host: Host, site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, __: Any, raw: Raw
) -> torch.Tensor:
    """Carry out an attention call of compiled code; with a mask there is none, it is stock's."""
    reason = host.dense_reason(site, q, q.shape[1])
    if reason:
        return run_dense(host, site, q, reason, partial(_dense, q, k, v))
    return engage(host, site, (q, k, v), unrotated(_rotate, raw), _dense)


COGVIDEOX = Family(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    sites=r"(transformer_blocks)\.\d+\.attn1",
    geometry=geometry,
    processors=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    attention=attention,
    answer=_answer,
)
