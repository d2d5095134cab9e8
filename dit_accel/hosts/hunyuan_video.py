"""HunyuanVideo: [video, text, padding], rotation of the video tokens alone.

Stock hands every layer a boolean mask [B, 1, 1, S] that hides the padded text as keys. Padded tokens still ask, but
nothing ever reads their answer: their keys are hidden in all layers and only video tokens leave the model. So where
all samples of a batch hold equally many text tokens, sparse calls leave padding out of the sequence, as query and
key, and answer it with zeros; where they differ, the mask becomes a key bias [B, 1, S]. Dense calls are stock's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..call import Site
from ..layout import Pad, Text, TokenLayout
from ..origin import Unchanged
from ..seat import Seat
from .family import Family, Host, LayoutUnknownError
from .generic import key_bias
from .geometry import Arguments, text, video
from .norm_rope import QKV, Projected, Rotary, Rotation, from_the_first
from .own import Raw, dispatch, engage, projected, rotate_pairs, run_dense, run_sparse, unrotated

_PROMPTS = 4  # text lengths remembered: the prompt, the negative prompt, and some more


def geometry(transformer: torch.nn.Module, arguments: Arguments, memo: dict[str, Any]) -> TokenLayout:
    """Read the grid from the latents and the text length from its mask, which is read once per tensor object."""
    grid, words = video(transformer, arguments), text(arguments)
    mask = arguments.get("encoder_attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise LayoutUnknownError("the call carries no encoder_attention_mask [B, text tokens]")
    valid, total = _valid(mask, memo), sum(w.length for w in words)
    if valid is None or valid >= total:
        return TokenLayout([grid, *words])
    return TokenLayout([grid, *([Text(valid)] if valid else []), Pad(total - valid)])


def _valid(mask: torch.Tensor, memo: dict[str, Any]) -> int | None:
    """Return how many text tokens every sample holds, None where they differ."""
    seen: list[tuple[Unchanged, int | None]] = memo.setdefault("masks", [])
    for unchanged, valid in seen:
        if unchanged.holds_for((mask,)):
            return valid
    lengths = set(mask.sum(1, dtype=torch.int).tolist())
    valid = lengths.pop() if len(lengths) == 1 else None
    memo["masks"] = [*seen, (Unchanged((mask,)), valid)][-_PROMPTS:]
    return valid


def attention(
    original: Any,
    host: Host | Seat,
    site: Site,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Any:
    """Stand in for HunyuanVideoAttnProcessor2_0: video [B, S, C] and text in, (video, text) out."""
    stock = partial(original, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    words = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    cells = hidden_states.shape[1]
    reason = host.dense_reason(site, hidden_states, cells + words)
    if not reason and encoder_hidden_states is None:
        reason = "the call carries no text"
    if reason or encoder_hidden_states is None:
        return run_dense(host, site, hidden_states, reason, stock)
    layout, padding = _without_padding(host.layout)
    bias, reason = (None, "") if padding else key_bias(attention_mask, cells + words)
    if reason:
        return run_dense(host, site, hidden_states, reason, stock)
    parts = _project(attn, hidden_states, encoder_hidden_states[:, : words - padding])
    dense = partial(dispatch, original, mask=None if padding else attention_mask)
    out = run_sparse(host, site, parts, ROTATION, image_rotary_emb, dense, layout, bias, attention_mask)
    return _project_out(attn, out[:, :cells], F.pad(out[:, cells:], (0, 0, 0, padding)))


def _answer(
    original: Any,
    host: Host,
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    raw: Raw,
) -> torch.Tensor:
    """Carry out an attention call of compiled code, where padding is still in: how much may change with a prompt."""
    reason = host.dense_reason(site, q, q.shape[1])
    layout, padding = _without_padding(host.layout)
    bias, unfit = (None, "") if padding else key_bias(mask, q.shape[1])
    if reason or unfit:
        return run_dense(host, site, q, reason or unfit, partial(dispatch, original, q, k, v, mask))
    kept = q.shape[1] - padding
    dense = partial(dispatch, original, mask=None if padding else mask)
    raw = [*(x[:, :kept] for x in raw[:2]), *raw[2:]]
    qkv = (q[:, :kept], k[:, :kept], v[:, :kept])
    out = engage(host, site, qkv, unrotated(_rotate, raw), dense, layout, bias)
    return F.pad(out, (0, 0, 0, 0, 0, padding))


def _without_padding(layout: TokenLayout | None) -> tuple[TokenLayout | None, int]:
    last = layout.segments[-1] if layout else None
    return (TokenLayout(layout.segments[:-1]), last.length) if layout and isinstance(last, Pad) else (layout, 0)


def _project(attn: Any, cells: torch.Tensor, words: torch.Tensor) -> list[Projected]:
    """Project, video before text; single blocks share one projection."""
    if attn.add_q_proj is None:
        return [_heads(attn, projected(attn, torch.cat([cells, words], 1)), attn.norm_q, attn.norm_k)]
    added = (attn.add_q_proj(words), attn.add_k_proj(words), attn.add_v_proj(words))
    return [
        _heads(attn, projected(attn, cells), attn.norm_q, attn.norm_k),
        _heads(attn, added, attn.norm_added_q, attn.norm_added_k),
    ]


def _heads(attn: Any, qkv: QKV, norm_q: Any, norm_k: Any) -> Projected:
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in qkv)
    return Projected(q, k, v, norm_q, norm_k)


def _rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the video tokens, which come first."""
    if rotary is None:
        return x
    cells = rotary[0].shape[0]
    return torch.cat([rotate_pairs(x[:, :cells], rotary), x[:, cells:]], 1)


ROTATION = Rotation(_rotate, from_the_first, partly=True)


def _project_out(attn: Any, cells: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if getattr(attn, "to_out", None) is not None:
        cells = attn.to_out[1](attn.to_out[0](cells))
    if getattr(attn, "to_add_out", None) is not None:
        words = attn.to_add_out(words)
    return cells, words


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    classes=("HunyuanVideoTransformer3DModel",),
    sites=r"((?:single_)?transformer_blocks)\.\d+\.attn",
    geometry=geometry,
    processors=("HunyuanVideoAttnProcessor2_0",),
    attention=attention,
    answer=_answer,
)
