"""What most families' geometry readers share: sizes read from the arguments of the transformer's forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..layout import Grid, Segment, Text
from .family import LayoutUnknownError

Arguments = Mapping[str, Any]


def latents(arguments: Arguments, rank: int) -> tuple[int, ...]:
    """Return the shape of the latents, which must have `rank` dimensions."""
    x = arguments.get("hidden_states")
    if not isinstance(x, torch.Tensor) or x.ndim != rank:
        raise LayoutUnknownError(f"hidden_states is no tensor of {rank} dimensions")
    return tuple(x.shape)


def text(arguments: Arguments) -> list[Segment]:
    """Return the text segment of the prompt's embeddings, none where they are empty."""
    words = arguments.get("encoder_hidden_states")
    if not isinstance(words, torch.Tensor):
        raise LayoutUnknownError("the call carries no encoder_hidden_states")
    return [Text(words.shape[1])] if words.shape[1] else []


def patch(transformer: torch.nn.Module) -> tuple[int, int, int]:
    """Return the model's patch as (frames, height, width)."""
    config: Any = transformer.config
    size = config.patch_size
    if isinstance(size, (tuple, list)):
        return (int(size[0]), int(size[1]), int(size[2]))
    return (int(getattr(config, "patch_size_t", None) or 1), int(size), int(size))


def picture(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Return the grid of latents [B, C, H, W]."""
    _, _, height, width = latents(arguments, 4)
    _, ph, pw = patch(transformer)
    return Grid(1, height // ph, width // pw)


def video(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Return the grid of latents [B, C, F, H, W]."""
    _, _, frames, height, width = latents(arguments, 5)
    pt, ph, pw = patch(transformer)
    return Grid(frames // pt, height // ph, width // pw)
