"""The means in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def means(x: Tensor, slots: Tensor, bounds: int | Tensor, centre: Tensor | None = None, form: str = "plain") -> Tensor:
    """Gather all tokens, then add them up unit by unit in fp32; shapes as in `unit_means`."""
    if isinstance(bounds, int):
        slots = torch.nn.functional.pad(slots, (0, -slots.shape[-1] % bounds), value=-1)
        picked = _gathered(x, slots).unflatten(2, (-1, bounds))
        if centre is not None or form != "plain":
            picked = _formed(picked.float(), None if centre is None else centre[:, :, :, None], form)
            picked = picked.masked_fill((slots < 0).unflatten(-1, (-1, bounds))[..., None], 0)
        sums = picked.sum(3, dtype=torch.float32)
        return sums / _at_least_one((slots >= 0).unflatten(-1, (-1, bounds)).sum(-1))
    b, _, h, d = x.shape
    units, length = bounds.shape[-1] - 1, slots.shape[-1]
    where = torch.arange(length, device=x.device).expand(*bounds.shape[:2], -1).contiguous()
    unit = torch.searchsorted(bounds.contiguous(), where, right=True) - 1
    unit = torch.where((unit < 0) | (unit == units), units, unit)  # outside of all units: thrown away
    at = unit.expand(b, h, -1)[..., None].expand(-1, -1, -1, d)
    picked = _gathered(x, slots).float()
    if centre is not None:
        whole = torch.nn.functional.pad(centre.expand(b, h, units, d), (0, 0, 0, 1))
        centre = whole.gather(2, at)
    picked = _formed(picked, centre, form).masked_fill((slots < 0)[..., None], 0)
    sums = torch.zeros(b, h, units + 1, d, device=x.device).scatter_add_(2, at, picked)
    both = torch.broadcast_shapes(unit.shape, slots.shape)
    held = torch.zeros(*both[:2], units + 1, dtype=torch.int64, device=x.device)
    held.scatter_add_(2, unit.expand(both), (slots >= 0).long().expand(both))
    return (sums / _at_least_one(held))[:, :, :units]


def _formed(x: Tensor, centre: Tensor | None, form: str) -> Tensor:
    """Return the tokens in the form that is averaged; holes have to be emptied again."""
    if centre is not None:
        x = x - centre
    if form == "direction":
        return torch.nn.functional.normalize(x, dim=-1)
    return x.abs() if form == "apart" else x


def _gathered(x: Tensor, slots: Tensor) -> Tensor:
    """Return the tokens of [B, S, H, D] in slot order, [B, H, slots, D], 0 in holes."""
    b, _, h, d = x.shape
    at = slots.clamp(min=0).long()
    if slots.shape[:2] == (1, 1):
        picked = x[:, at[0, 0]].transpose(1, 2)
    else:
        picked = x.transpose(1, 2).gather(2, at.expand(b, h, -1)[..., None].expand(-1, -1, -1, d))
    return picked.masked_fill((slots < 0)[..., None], 0)


def _at_least_one(held: Tensor) -> Tensor:
    return held.clamp(min=1)[..., None].float()
