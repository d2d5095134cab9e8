"""What a transformer's forward is given at a size, family by family: true shapes, random values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Cells = tuple[int, int, int]  # frames, height and width of latents, as the transformer is given them
Arguments = dict[str, Any]
Make = Callable[[Any, Cells, int, torch.device, torch.dtype], Arguments]


_PICTURE_TOKENS = 257  # of CLIP's picture encoder, which Wan 2.1's image to video uses


@dataclass(frozen=True)
class Inputs:
    """How one family's forward is called, with what its usual VAE and prompt make of pixels and words.

    `make(config, cells, text, device, dtype)` returns the arguments for one sample. `space`: pixels along one side of a
    latent, of which `packed` along a side make one cell; `time`: frames of one latent after the first, None for
    pictures; `text`: tokens of the prompt.
    """

    make: Make
    text: int
    space: int = 8
    packed: int = 1
    time: int | None = None


def wan(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Video latents [1, C, F, H, W]; text, and the picture where the model takes one, go to cross-attention."""
    arguments = {
        "hidden_states": torch.randn(1, config["in_channels"], *cells, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, text, config["text_dim"], device=device, dtype=dtype),
    }
    if config.get("image_dim"):
        picture = (1, _PICTURE_TOKENS, config["image_dim"])
        arguments["encoder_hidden_states_image"] = torch.randn(picture, device=device, dtype=dtype)
    return arguments


def hunyuan(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Video latents and a prompt that fills half of its room, the rest is padding."""
    valid = torch.arange(text, device=device)[None] < text // 2
    arguments = {
        "hidden_states": torch.randn(1, config["in_channels"], *cells, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim"], device=device, dtype=dtype),
        "encoder_attention_mask": valid.to(dtype),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], device=device, dtype=dtype),
    }
    if config["guidance_embeds"]:
        arguments["guidance"] = torch.tensor([6000.0], device=device, dtype=dtype)
    return arguments


def flux(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Packed latents [1, H * W, C] with their places as ids; text in the same sequence."""
    _, height, width = cells
    ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width)))
    arguments = {
        "hidden_states": torch.randn(1, height * width, config["in_channels"], device=device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"], device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], device=device, dtype=dtype),
        "img_ids": ids.to(dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }
    if config["guidance_embeds"]:
        arguments["guidance"] = torch.tensor([3.5], device=device, dtype=dtype)
    return arguments


def qwen_image(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Packed latents [1, H * W, C]; text in the same sequence, none of it padding."""
    _, height, width = cells
    return {
        "hidden_states": torch.randn(1, height * width, config["in_channels"], device=device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"], device=device, dtype=dtype),
        "img_shapes": [[(1, height, width)]],
    }


def cogvideox(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Video latents [1, F, C, H, W], text in the same sequence; rotation where the model has one."""
    frames, height, width = cells
    arguments: Arguments = {
        "hidden_states": torch.randn(1, frames, config["in_channels"], height, width, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, text, config["text_embed_dim"], device=device, dtype=dtype),
    }
    if config["use_rotary_positional_embeddings"]:
        per = config["patch_size"] ** 2 * (config["patch_size_t"] or 1)
        shape = (frames * height * width // per, config["attention_head_dim"])
        arguments["image_rotary_emb"] = tuple(torch.randn(shape, device=device) for _ in range(2))
    return arguments


def ltx(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Packed video latents [1, F * H * W, C]; text goes to cross-attention."""
    frames, height, width = cells
    tokens = frames * height * width
    return {
        "hidden_states": torch.randn(1, tokens, config["in_channels"], device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, text, config["caption_channels"], device=device, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, text, device=device),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def stable_diffusion_3(config: Any, cells: Cells, text: int, device: torch.device, dtype: torch.dtype) -> Arguments:
    """Picture latents [1, C, H, W], text in the same sequence."""
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *cells[1:], device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"], device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], device=device, dtype=dtype),
    }


INPUTS: dict[str, Inputs] = {  # by name of the family; text as the pipelines of diffusers 0.42 default to
    "wan": Inputs(wan, text=512, time=4),
    "hunyuan-video": Inputs(hunyuan, text=256, time=4),
    "flux": Inputs(flux, text=512, packed=2),
    "qwen-image": Inputs(qwen_image, text=512, packed=2),
    "cogvideox": Inputs(cogvideox, text=226, time=4),
    "ltx-video": Inputs(ltx, text=128, space=32, time=8),
    "stable-diffusion-3": Inputs(stable_diffusion_3, text=77 + 256),
}
