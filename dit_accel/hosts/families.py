"""The families the generic host serves: where their self-attention sits and how a call's geometry is read.

Token orders are those of diffusers 0.42; a call whose length does not match what is read here stays dense.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layout import Grid, Pad, Segment, Text, TokenLayout
from .family import Family, LayoutUnknownError
from .flux import geometry as flux_geometry
from .geometry import Arguments, picture, text

_Z_IMAGE_MULTIPLE = 32  # Z-Image rounds the picture and the caption up to this many tokens each


def _picture_then_text(transformer: torch.nn.Module, arguments: Arguments, _: dict[str, Any]) -> TokenLayout:
    return TokenLayout([picture(transformer, arguments), *text(arguments)])


def _picture_alone(transformer: torch.nn.Module, arguments: Arguments, _: dict[str, Any]) -> TokenLayout:
    return TokenLayout([picture(transformer, arguments)])


def _ltx(_: torch.nn.Module, arguments: Arguments, __: dict[str, Any]) -> TokenLayout:
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    if not (isinstance(frames, int) and isinstance(height, int) and isinstance(width, int)):
        raise LayoutUnknownError("the call carries no num_frames, height and width")
    return TokenLayout(grid=(frames, height, width))


def _qwen_image(_: torch.nn.Module, arguments: Arguments, __: dict[str, Any]) -> TokenLayout:
    shapes = arguments.get("img_shapes")
    if not shapes:
        raise LayoutUnknownError("the call carries no img_shapes")
    samples = [[tuple(s) for s in item] if isinstance(item, list) else [tuple(item)] for item in shapes]
    if any(sample != samples[0] for sample in samples):
        raise LayoutUnknownError("the samples of the batch have different sizes")
    grids = [Grid(*(int(n) for n in s), role="reference" if i else "main") for i, s in enumerate(samples[0])]
    return TokenLayout([*text(arguments), *grids])


def _z_image(_: torch.nn.Module, arguments: Arguments, __: dict[str, Any]) -> TokenLayout:
    pictures, captions = arguments.get("x"), arguments.get("cap_feats")
    if not pictures or not captions or not isinstance(pictures[0], torch.Tensor):
        raise LayoutUnknownError("the call is not of the form one picture and one caption a sample")
    if any(p.shape != pictures[0].shape for p in pictures):
        raise LayoutUnknownError("the samples of the batch have different sizes")
    _, frames, height, width = pictures[0].shape
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    grid = Grid(frames // patch_t, height // patch, width // patch)
    filler: list[Segment] = [Pad(pad)] if (pad := -grid.length % _Z_IMAGE_MULTIPLE) else []
    longest = max(-(-len(c) // _Z_IMAGE_MULTIPLE) * _Z_IMAGE_MULTIPLE for c in captions)
    return TokenLayout([grid, *filler, Text(longest)])


_BLOCKS = r"(transformer_blocks)\.\d+\.attn"

FAMILIES: tuple[Family, ...] = (
    Family("stable-diffusion-3", ("SD3Transformer2DModel",), _BLOCKS + "2?", _picture_then_text),
    Family("qwen-image", ("QwenImageTransformer2DModel",), _BLOCKS, _qwen_image),
    Family("z-image", ("ZImageTransformer2DModel",), r"(layers)\.\d+\.attention", _z_image),
    Family("pixart", ("PixArtTransformer2DModel",), _BLOCKS + "1", _picture_alone),
    Family("chroma", ("ChromaTransformer2DModel",), r"((?:single_)?transformer_blocks)\.\d+\.attn", flux_geometry),
    Family("ltx-video", ("LTXVideoTransformer3DModel",), _BLOCKS + "1", _ltx),
)
