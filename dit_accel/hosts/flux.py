"""Flux.1, Kontext and Fill: [text, picture(, reference pictures)], rotation over the joint sequence."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..call import Site
from ..layout import Grid, Segment, Text, TokenLayout
from ..seat import Seat
from .family import Family, Host, LayoutUnknownError
from .norm_rope import Projected
from .own import PAIRS, answer, dispatch, projected, rotate_pairs, run_dense, run_sparse


def geometry(_: torch.nn.Module, arguments: Mapping[str, Any], memo: dict[str, Any]) -> TokenLayout:
    """Read the grids from the values of `img_ids`, once per tensor object, and the text length from its embeddings."""
    ids, text = arguments.get("img_ids"), arguments.get("encoder_hidden_states")
    if not isinstance(ids, torch.Tensor) or not isinstance(text, torch.Tensor):
        raise LayoutUnknownError("the call carries no img_ids or no encoder_hidden_states")
    seen = memo.get("ids")
    if seen is None or seen[0]() is not ids:
        memo["ids"] = seen = (weakref.ref(ids), grids(ids))
    segments: list[Segment] = [Text(text.shape[1])] if text.shape[1] else []
    return TokenLayout([*segments, *seen[1]])


def grids(ids: torch.Tensor) -> list[Segment]:
    """Split position ids [S, 3+] (or [B, S, 3+]) into full raster grids; later ones are references."""
    table = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64).numpy()
    cuts = np.flatnonzero((np.diff(table[:, 0]) != 0) | _restarts(table)) + 1
    found: list[Segment] = []
    for part in np.split(table, cuts):
        height, width = len(np.unique(part[:, 1])), len(np.unique(part[:, 2]))
        rows = np.repeat(np.unique(part[:, 1]), width)
        cols = np.tile(np.unique(part[:, 2]), height)
        if len(part) != height * width or (part[:, 1] != rows).any() or (part[:, 2] != cols).any():
            raise LayoutUnknownError("img_ids is no full raster grid")
        found.append(Grid(1, height, width, role="reference" if found else "main"))
    return found


def _restarts(table: np.ndarray) -> np.ndarray:
    """Where the row number falls back: a second picture that carries the same first id."""
    return np.diff(table[:, 1]) < 0


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
    """Stand in for FluxAttnProcessor: own projection, norm and rotation, then the engine.

    `hidden_states` [B, S, C]; returns what the processor returns: a tensor, or (picture, text) in double blocks.
    """
    stock = partial(original, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    reason = host.dense_reason(site, hidden_states, hidden_states.shape[1] + text)
    if not reason and attention_mask is not None:
        reason = "the call carries an attention mask"
    if reason:
        return run_dense(host, site, hidden_states, reason, stock)
    parts = _project(attn, hidden_states, encoder_hidden_states)
    out = run_sparse(host, site, parts, PAIRS, image_rotary_emb, partial(dispatch, original))
    return out if encoder_hidden_states is None else _project_out(attn, out, text)


def _project(attn: Any, picture: torch.Tensor, text: torch.Tensor | None) -> list[Projected]:
    """Project, text before picture; fused projections are honoured."""
    fused = getattr(attn, "fused_projections", False)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected(attn, picture, fused))
    pixels = Projected(q, k, v, attn.norm_q, attn.norm_k)
    if text is None or attn.added_kv_proj_dim is None:
        return [pixels]
    if fused and hasattr(attn, "to_added_qkv"):
        qkv = attn.to_added_qkv(text).chunk(3, -1)
    else:
        qkv = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv)
    return [Projected(q, k, v, attn.norm_added_q, attn.norm_added_k), pixels]


def _project_out(attn: Any, out: torch.Tensor, text: int) -> Any:
    words, picture = out[:, :text], out[:, text:]
    picture = attn.to_out[1](attn.to_out[0](picture.contiguous()))
    return picture, attn.to_add_out(words.contiguous())


FLUX = Family(
    name="flux",
    classes=("FluxTransformer2DModel",),
    sites=r"((?:single_)?transformer_blocks)\.\d+\.attn",
    geometry=geometry,
    processors=("FluxAttnProcessor",),
    attention=attention,
    answer=partial(answer, rotate_pairs),
)
