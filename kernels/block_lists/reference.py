"""The lists in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.bits import as_mask


def lists(
    units: Tensor, q_owner: Tensor, k_owner: Tensor, q_tokens: Tensor, k_tokens: Tensor, block_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spread the units over their blocks, then number each row's blocks; shapes as in `block_lists`."""
    # the spare bits of the last byte belong to no block
    blocks = _spread(_spread(as_mask(units), q_owner, -2), k_owner, -1)
    blocks = blocks & (q_tokens > 0)[..., None] & (k_tokens > 0)[..., None, :]
    full = blocks & (k_tokens == block_k)[..., None, :]
    pairs = (blocks * (q_tokens[..., None] * k_tokens[..., None, :])).sum(-1)
    width = blocks.shape[-1]
    full_count = full.sum(-1, dtype=torch.int32)
    count = blocks.sum(-1, dtype=torch.int32)
    among_full = full.cumsum(-1, dtype=torch.int32)
    among_all = blocks.cumsum(-1, dtype=torch.int32)
    place = torch.where(full, among_full, full_count[..., None] + among_all - among_full) - 1
    place = torch.where(blocks, place, width).long()  # what is not computed goes to an extra column
    ids = torch.arange(width, dtype=torch.int32, device=blocks.device).expand_as(place)
    index = torch.zeros(*place.shape[:-1], width + 1, dtype=torch.int32, device=blocks.device)
    return index.scatter_(-1, place, ids)[..., :width].contiguous(), count, full_count, pairs


def _spread(mask: Tensor, owner: Tensor, axis: int) -> Tensor:
    """Repeat the units of one axis of a mask for the blocks they own."""
    if owner.shape[:2] == (1, 1):
        return mask.index_select(axis, owner[0, 0])
    b, h = torch.broadcast_shapes(mask.shape[:2], owner.shape[:2])
    at = owner[..., None] if axis == -2 else owner[..., None, :]
    shape = [b, h, *mask.shape[2:]]
    shape[axis] = owner.shape[-1]
    return mask.expand(b, h, -1, -1).gather(axis, at.expand(shape))
