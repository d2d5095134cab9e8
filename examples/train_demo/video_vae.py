"""The video VAE: its sizes, its training on windows of clips, and clips as latents.

The stock class encodes and decodes frame group by frame group with a cache. `encode` and `decode` here do the
same arithmetic on whole clips at once, which is faster on a GPU (tests/test_train_video.py compares the two).
"""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from optimizer import Optimizer, is_kernel
from parallel import Group
from torch import nn
from video_model import Shape
from video_render import draw_clips, render, window
from video_scenes import SceneTable

PATCH = 4  # pixels folded into channels before the first convolution
SIZE, LENGTH = 128, 17  # pixels and frames of a training window
KL_WEIGHT = 1e-4


def build_vae(shape: Shape) -> AutoencoderKLWan:
    """Factors 16 in space and 4 in time, with the shortcuts of Wan 2.2's."""
    latents = shape.latent_channels
    vae = AutoencoderKLWan(
        base_dim=shape.encoder_width,
        decoder_base_dim=shape.decoder_width,
        z_dim=latents,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_spatial=4 * PATCH,
    )
    # The residual blocks start as the identity and the latents with little noise: this learns far faster. Attention
    # stays the identity, so that what is learned on windows holds on any canvas.
    nn.init.constant_(vae.quant_conv.bias[latents:], -5.0)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
            module.requires_grad_(False)
    return vae


def resample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    """In space every frame; in time all but the first, which stays alone."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x[:, :, 1:].shape
        later = layer.time_conv(x[:, :, 1:]).view(b, 2, c, t, h, w)
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)], dim=2)
    b, c, t, h, w = x.shape
    x = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
    x = x.view(b, t, *x.shape[1:]).transpose(1, 2)
    if layer.mode == "downsample3d" and t > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def finish(coder: WanEncoder3d | WanDecoder3d, x: torch.Tensor) -> torch.Tensor:
    return coder.conv_out(coder.nonlinearity(coder.norm_out(x)))


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of clips [B, 3, T, H, W], as vae.encode gives them."""
    coder = vae.encoder
    x = coder.conv_in(patchify(clips, PATCH).contiguous(memory_format=torch.channels_last_3d))
    for block in coder.down_blocks:
        y = x
        for layer in block.resnets:
            y = layer(y)
        y = y if block.downsampler is None else resample(block.downsampler, y)
        x = y + block.avg_shortcut(x)
    mean, logvar = vae.quant_conv(finish(coder, coder.mid_block(x))).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips of unscaled latents, as vae.decode gives them but not clamped."""
    coder = vae.decoder
    x = vae.post_quant_conv(latents.contiguous(memory_format=torch.channels_last_3d))
    x = coder.mid_block(coder.conv_in(x))
    for block in coder.up_blocks:
        y = x
        for layer in block.resnets:
            y = layer(y)
        y = y if block.upsampler is None else resample(block.upsampler, y)
        x = y if block.avg_shortcut is None else y + block.avg_shortcut(x, first_chunk=True)
    return unpatchify(finish(coder, x), PATCH).float()


def draw_windows(cutouts: torch.Tensor, table: SceneTable, batch: int) -> torch.Tensor:
    """Windows around the middle of random clips."""
    scenes = torch.randint(len(table.motions), (batch,), device=cutouts.device)
    clips = draw_clips(table, scenes, 384, 512)
    return render(cutouts, clips, *window(clips, SIZE, LENGTH))


def loss_of(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    dtype = vae.quant_conv.weight.dtype
    mean, logvar = encode(vae, clips.to(dtype))
    decoded = decode(vae, (mean + (0.5 * logvar).exp() * torch.randn_like(mean)).to(dtype))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(decoded, clips) + F.mse_loss(decoded, clips) + KL_WEIGHT * kl


def train_vae(
    cutouts: torch.Tensor, table: SceneTable, shape: Shape, group: Group, seconds: float, batch: int
) -> AutoencoderKLWan:
    """Train for the given time from scratch; cosine decay over the time."""
    vae = build_vae(shape).to(group.device)
    group.copy_main_([p.data for p in vae.parameters()])
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    optimizer = Optimizer(vae, dtype, muon_rate=2e-2, adam_rate=2e-3, is_matrix=is_kernel)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        if step % 10 == 0:
            done = group.from_main((time.time() - start) / seconds)
        rate = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
        loss = loss_of(vae, draw_windows(cutouts, table, batch))
        loss.backward()
        optimizer.step(group, rate, quantise=False)
        step += 1
        if group.main and step % 100 == 0:
            print(f"vae step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    trained = build_vae(shape).to(group.device).eval()
    trained.load_state_dict(optimizer.averaged())
    return trained


@torch.no_grad()
def latents_of(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them, scaled by the mean and deviation in the VAE's config."""
    with torch.autocast(clips.device.type, torch.bfloat16):
        mean, _ = encode(vae, clips)
    shift, scale = (
        torch.tensor(values, device=clips.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mean - shift) / scale


@torch.no_grad()
def set_scaling(vae: AutoencoderKLWan, cutouts: torch.Tensor, table: SceneTable, batch: int) -> None:
    """Store mean and deviation of each channel over windows, where things fill more of the view than in clips."""
    latents = latents_of(vae, draw_windows(cutouts, table, batch)).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, cutouts: torch.Tensor, table: SceneTable, batch: int) -> float:
    """PSNR in dB of the stock decode(encode(.)) over windows."""
    clips = draw_windows(cutouts, table, batch)
    decoded = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return 10 * torch.log10(4 / (decoded - clips).square().mean()).item()
