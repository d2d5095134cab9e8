"""The parts of the pipeline, all stock classes: transformer, VAE, the two text encoders and the scheduler."""

import math
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_CHANNELS = 4
VAE_FACTOR = 2
TOKEN_PIXELS = 2 * VAE_FACTOR  # latents are packed 2x2, so a token covers 4x4 pixels


@dataclass(frozen=True)
class Shape:
    """Sizes of all parts."""

    heads: int
    double_blocks: int
    single_blocks: int
    t5_width: int
    clip_width: int
    vae_channels: tuple[int, int]


SHAPES = {
    "full": Shape(heads=5, double_blocks=1, single_blocks=7, t5_width=192, clip_width=128, vae_channels=(32, 64)),
    "tiny": Shape(heads=1, double_blocks=1, single_blocks=1, t5_width=32, clip_width=32, vae_channels=(8, 8)),
}


def build_transformer(shape: Shape) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=shape.double_blocks,
        num_single_layers=shape.single_blocks,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.t5_width,
        pooled_projection_dim=shape.clip_width,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    # Every block starts as the identity and the output at zero, as in DiT.
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or ".norm" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def build_vae(shape: Shape) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=shape.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_text_encoders(shape: Shape, vocabulary: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Both run without dropout. T5 attends to padding, as in FluxPipeline. Ids 0, 1, 3: pad, end, start."""
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=shape.clip_width,
        intermediate_size=3 * shape.clip_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu",
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
        attn_implementation="eager",
    )
    t5 = T5Config(
        vocab_size=vocabulary,
        d_model=shape.t5_width,
        d_kv=shape.t5_width // 4,
        d_ff=2 * shape.t5_width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


def build_scheduler(shift_128: float, shift_256: float) -> FlowMatchEulerDiscreteScheduler:
    """Time shift given at 128 and 256 px; FluxPipeline interpolates its logarithm over the token count."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=token_count(128),
        max_image_seq_len=token_count(256),
        base_shift=math.log(shift_128),
        max_shift=math.log(shift_256),
    )


def token_count(pixels: int) -> int:
    return (pixels // TOKEN_PIXELS) ** 2


def image_ids(pixels: int, stride: int, device: torch.device) -> torch.Tensor:
    """Rope positions [tokens, 3]. A stride above 1 spreads a small picture over the larger canvas."""
    side = pixels // TOKEN_PIXELS
    axis = (torch.arange(side, device=device) + 0.5) * stride - 0.5
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to tokens [B, H/2 * W/2, 4C], FluxPipeline's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)
