"""Train the VAE on crops of the pictures and turn the pictures into latents."""

import math
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from model import Shape, build_vae
from parallel import Group

CROP = 128
KL_WEIGHT = 1e-4


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return pictures.float() / 127.5 - 1


def shrink(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Area-averaged to side x side; the sides divide 256."""
    return F.avg_pool2d(pictures, pictures.shape[-1] // side)


def draw_crops(pictures: torch.Tensor, batch: int) -> torch.Tensor:
    """Half crops of the 256 px pictures, half whole pictures at 128 px, mirrored at random."""
    chosen = to_unit(pictures[torch.randint(len(pictures), (batch,), device=pictures.device)])
    top, left = torch.randint(0, pictures.shape[-1] - CROP + 1, (2,)).tolist()
    crops = chosen[: batch // 2, :, top : top + CROP, left : left + CROP]
    mixed = torch.cat([crops, shrink(chosen[batch // 2 :], CROP)])
    return mixed.flip(-1) if torch.rand(()) < 0.5 else mixed


def loss_of(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + KL_WEIGHT * kl


def train_vae(pictures: torch.Tensor, shape: Shape, group: Group, seconds: float, batch: int) -> AutoencoderKL:
    """Train for the given time from scratch; cosine decay over the time."""
    vae = build_vae(shape).to(group.device, memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    group.copy_main_([p.data for p in parameters])
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        if step % 10 == 0:
            done = group.from_main((time.time() - start) / seconds)
        for settings in optimizer.param_groups:
            settings["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
        with torch.autocast(group.device.type, torch.bfloat16):
            loss = loss_of(vae, draw_crops(pictures, batch).contiguous(memory_format=torch.channels_last))
        loss.backward()
        for p in parameters:
            group.average_(p.grad)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if group.main and step % 200 == 0:
            print(f"vae step {step} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    return vae.eval()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: torch.Tensor, side: int, batch: int = 16) -> float:
    """Mean PSNR in dB of decode(encode(.)) over pictures brought to `side`."""
    values = []
    for part in pictures.split(batch):
        wanted = shrink(to_unit(part), side)
        decoded = vae.decode(vae.encode(wanted).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (decoded - wanted).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor, side: int, batch: int = 32) -> torch.Tensor:
    """Unscaled latents [N, 4, side/2, side/2]."""
    parts = [vae.encode(shrink(to_unit(p), side)).latent_dist.mode() for p in pictures.split(batch)]
    return torch.cat(parts)


@torch.no_grad()
def set_scaling(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Store mean and inverse deviation of the latents at the two sizes the model is made for."""
    values = torch.cat([encode_all(vae, pictures, side).flatten() for side in (128, 256)])
    vae.register_to_config(shift_factor=values.mean().item(), scaling_factor=1 / values.std().item())
