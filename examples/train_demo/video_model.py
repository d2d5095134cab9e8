"""The parts of emoji-wan, all stock classes: transformer, text encoder and scheduler (the VAE is in video_vae.py)."""

import math
from dataclasses import dataclass

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

TEXT_LENGTH = 512  # WanPipeline's default: a caption is followed by this many zeros less its length


@dataclass(frozen=True)
class Shape:
    """Sizes of all parts."""

    heads: int
    blocks: int
    text_width: int
    latent_channels: int
    encoder_width: int
    decoder_width: int


SHAPES = {
    "full": Shape(heads=4, blocks=9, text_width=128, latent_channels=24, encoder_width=24, decoder_width=32),
    "tiny": Shape(heads=1, blocks=2, text_width=32, latent_channels=4, encoder_width=4, decoder_width=4),
}


def build_transformer(shape: Shape) -> WanTransformer3DModel:
    width = 64 * shape.heads
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=shape.heads,
        attention_head_dim=64,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        text_dim=shape.text_width,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=shape.blocks,
    )
    # Every block starts as the identity and the output at zero, as in DiT.
    zero = [model.proj_out, model.condition_embedder.time_proj, *(b.attn2.to_out[0] for b in model.blocks)]
    for module in zero:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    for table in (model.scale_shift_table, *(b.scale_shift_table for b in model.blocks)):
        nn.init.zeros_(table)
    return model


def build_text_encoder(shape: Shape, vocabulary: int) -> UMT5EncoderModel:
    """Without dropout. Ids 0 and 1: pad and end."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=shape.text_width,
        d_kv=shape.text_width // 4,
        d_ff=2 * shape.text_width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )
    return UMT5EncoderModel(config)


def build_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Wan's own sampler."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


class CountedPadding(WanAttnProcessor):
    """Attention to a short text whose last key is padding and counts for all that TEXT_LENGTH would add.

    Equal keys with equal values are one key whose score is raised by the logarithm of their number, so training
    on LENGTH tokens is exact for the pipeline's TEXT_LENGTH.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *unused: None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
        is_last = torch.arange(key.shape[2], device=key.device) == key.shape[2] - 1
        scores = scores + is_last * math.log(TEXT_LENGTH - key.shape[2] + 1)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Transformer and text encoder, trained jointly."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.transformer = build_transformer(shape)
        self.text = build_text_encoder(shape, vocabulary)
        for block in self.transformer.blocks:
            block.attn2.set_processor(CountedPadding())

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, LENGTH, width] of padded tokens, zero after each caption's end as in WanPipeline."""
        there = tokens != 0
        return self.text(tokens, there)[0] * there[..., None]

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity of noisy latents [B, C, T, H, W] at times [B] from 0 (clean) to 1 (noise)."""
        return self.transformer(noisy, 1000 * times, self.read(tokens), return_dict=False)[0]
