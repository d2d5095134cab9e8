"""The error in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of weights and sums held at once


def lengths(
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    bounds: Tensor,
    block: int,
    means_v: Tensor,
    scale: float,
) -> Tensor:
    """Do a few queries at a time, in fp32, block by block; shapes as in `unit_error`."""
    b, h, _, d = queries.shape
    units = means_v.shape[2]
    alike = slots.shape[:2] == (1, 1)  # of all heads
    slots = slots.expand(b, h, -1)
    first = torch.arange(0, slots.shape[2], block, device=k.device).expand(*bounds.shape[:2], -1).contiguous()
    owner = (torch.searchsorted(bounds.contiguous(), first, right=True) - 1).expand(b, h, -1)  # `units`: of none
    real = (slots >= 0).unflatten(-1, (-1, block)) & (owner < units)[..., None]
    keys, values = (_by_block(x, slots, real, alike) for x in (k, v))
    tokens = torch.zeros(b, h, units + 1, device=k.device).scatter_add_(-1, owner, real.sum(-1).float())[..., :units]
    tokens = tokens[:, :, None]
    out = [torch.zeros(b, h, 0, units, device=k.device)]
    for part in queries.split(max(1, BYTES // max(1, 4 * b * h * owner.shape[2] * (d + block))), 2):
        logits = torch.einsum("bhrd,bhnsd->bhrns", part * scale, keys)
        to = owner[:, :, None].expand(-1, -1, part.shape[2], -1)
        middle = torch.zeros(b, h, part.shape[2], units + 1, device=k.device)
        middle = middle.scatter_add_(3, to, (logits * real[:, :, None]).sum(-1))[..., :units] / tokens.clamp(min=1)
        logits = logits.masked_fill(~real[:, :, None], float("-inf"))
        top = logits.amax((-1, -2), keepdim=True)
        weights = (logits - top).exp()
        sums = torch.einsum("bhrns,bhnsd->bhrnd", weights, values)
        exact = torch.zeros(b, h, part.shape[2], units + 1, d, device=k.device)
        exact = exact.scatter_add_(3, to[..., None].expand(-1, -1, -1, -1, d), sums)[:, :, :, :units]
        pooled = (middle - top[..., 0]).exp() * tokens  # the mean key's logit is the mean of its keys' logits
        error = exact.sub_(pooled[..., None] * means_v[:, :, None]).norm(dim=-1)
        out.append(error / weights.sum((-1, -2))[..., None])
    return torch.cat(out, 2)


def _by_block(x: Tensor, slots: Tensor, real: Tensor, alike: bool) -> Tensor:
    """Lay [B, S, H, D] into blocks, float32 [B, H, blocks, block, D], 0 in holes and in no unit."""
    at = slots.clamp(min=0).long()
    if alike:
        picked = x[:, at[0, 0]].transpose(1, 2)
    else:
        picked = x.transpose(1, 2).gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))
    return picked.unflatten(2, real.shape[2:]).masked_fill(~real[..., None], 0).float()
