"""Tiny pipelines whose heads attend where they are told to, whatever is drawn: structure that must be found again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny
import torch

SHARP = 200.0  # the logit of a token that lies where a head looks
CHANNELS = {"flux": {"f": 0, "h": 4, "w": 8}, "wan": {"f": 0, "h": 4, "w": 8}}  # first rotated pair of each axis


def planted(family: str, looks: Sequence[str], silent: Sequence[tuple[int, int]] = ()) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline and its call, where each head of every site attends to the keys that share its place.

    `looks`: for each head the axes on which a key's place must be the query's: "f" the same frame, "h" the same row,
    "hw" the same place in every frame, "" any key alike. Queries and keys are the same vector for all tokens, so that
    only the rotation tells them apart. `silent`: (site, head) whose values are nothing.
    """
    pipe, call = {"flux": tiny.flux, "wan": tiny.wan}[family](heads=len(looks))
    sites = [m for m in pipe.transformer.modules() if hasattr(m, "norm_q") and not _crosses(m)]
    for number, attn in enumerate(sites):
        dim = attn.to_q.weight.shape[0] // len(looks)
        bias = torch.zeros(len(looks), dim)
        for head, axes in enumerate(looks):
            for axis in axes:
                bias[head, CHANNELS[family][axis]] = 1.0
        for name in ("to_q", "to_k", "add_q_proj", "add_k_proj"):
            _set(getattr(attn, name, None), bias.flatten())
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norm = getattr(attn, name, None)
            if norm is not None:
                # what normalising makes of one channel is undone, so that every channel gives the same logit
                rms = bias.square().mean().sqrt() if norm.weight.numel() > dim else dim**-0.5
                norm.weight.data.fill_(float(rms) * (SHARP * dim**0.5) ** 0.5)
        for site, head in silent:
            if site == number:
                for name in ("to_v", "add_v_proj"):
                    _silence(getattr(attn, name, None), slice(head * dim, (head + 1) * dim))
    return pipe, call


def _crosses(attn: Any) -> bool:
    return bool(getattr(attn, "is_cross_attention", False) or getattr(attn, "cross_attention_dim_head", None))


def _set(linear: Any, bias: torch.Tensor) -> None:
    if linear is not None:
        linear.weight.data.zero_()
        linear.bias.data.copy_(bias)


def _silence(linear: Any, channels: slice) -> None:
    if linear is not None:
        linear.weight.data[channels] = 0
        linear.bias.data[channels] = 0
