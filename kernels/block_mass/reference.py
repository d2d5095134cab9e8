"""The mass in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BYTES = 256 << 20  # of logits held at once


def mass(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, key_bias: Tensor | None
) -> Tensor:
    """Attend a few query units at a time, in fp32; shapes as in `block_mass`."""
    keys = _Keys(k, k_slots, unit, key_bias)
    out = [torch.zeros(k.shape[0], k.shape[2], 0, keys.units, device=k.device)]
    for part in keys.parts(q_slots):
        out.append(_mean(keys.logits(q, part, scale).softmax(-1) @ keys.gather, part))
    return torch.cat(out, 2)


def mass_and_lse(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    key_bias: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend with log-sum-exps of an earlier call, or find them; shapes as in `block_mass_and_lse`."""
    keys, done = _Keys(k, k_slots, unit, key_bias), 0
    out = [torch.zeros(k.shape[0], k.shape[2], 0, keys.units, device=k.device)]
    found = []
    for part in keys.parts(q_slots):
        logits = keys.logits(q, part, scale)
        here = logits.logsumexp(-1) if lse is None else lse[:, :, done : done + part.numel()]
        out.append(_mean((logits - here[..., None]).exp() @ keys.gather, part))
        found.append(here)
        done += part.numel()
    return torch.cat(out, 2), torch.cat(found, 2) if lse is None else lse


class _Keys:
    """The keys of a call, which unit each token belongs to, and a bias that hides those in no slot."""

    def __init__(self, k: Tensor, k_slots: Tensor, unit: int, key_bias: Tensor | None) -> None:
        _, s, _, _ = k.shape
        self.unit, self.units = unit, len(k_slots) // unit
        owner = torch.full((s + 1,), self.units, device=k.device)  # the last is where holes point to
        owner[torch.where(k_slots < 0, s, k_slots).long()] = torch.arange(len(k_slots), device=k.device) // unit
        owner = owner[:s]
        gather = torch.zeros(s, self.units + 1, device=k.device).scatter_(1, owner[:, None], 1.0)
        self.gather = gather[:, : self.units]
        away = torch.zeros(s, device=k.device).masked_fill(owner == self.units, float("-inf"))
        self._bias = away if key_bias is None else away + key_bias[:, :, None]
        self._keys = k.permute(0, 2, 3, 1).float()

    def parts(self, q_slots: Tensor) -> Iterator[Tensor]:
        """Yield the slots of a few query units at a time, [units, unit]."""
        b, h, _, s = self._keys.shape
        yield from q_slots.view(-1, self.unit).split(max(1, BYTES // (4 * b * h * s * self.unit)))

    def logits(self, q: Tensor, part: Tensor, scale: float) -> Tensor:
        """Return the logits of some slots to all keys, float32 [B, H, slots, S]; a hole asks what token 0 asks."""
        queries = q[:, part.clamp(min=0).long().flatten()].transpose(1, 2).float()
        return queries @ self._keys * scale + self._bias


def _mean(share: Tensor, part: Tensor) -> Tensor:
    """Average over the tokens of each unit, [B, H, slots, key units] -> [B, H, units, key units]."""
    hole = part < 0
    share = share.unflatten(2, part.shape).masked_fill(hole[..., None], 0)
    return share.sum(3) / (~hole).sum(-1).clamp(min=1)[:, None]
