"""Whether a head's pooled score can be trusted: how far it lies from the exact attention of a few query units."""

from __future__ import annotations

import torch

from . import rows
from .cut import Cut
from .inputs import Inputs
from .scores import grid_means, grid_weights


def divergence(cut: Cut, inputs: Inputs, count: int) -> torch.Tensor:
    """Return each head's largest square root of the Jensen-Shannon divergence, float32 [B, H], 0 to sqrt(ln 2).

    FlexPrefill, Lai et al. 2025, arXiv 2502.20766: of a query unit, the mean of its exact attention to each key unit
    against the softmax over mean keys of its mean query. There the last 128 queries; here units of `count` queries in
    all, at least two units, spread over the grid, of which the worst counts. Text takes no part. The cut lies alike for
    all samples and heads.
    """
    side, length = cut.q, cut.length
    size = side.per * side.block
    tokens = rows.sample(inputs.layout, max(count // size, 2), inputs.q.device)
    picked = side.unit_of_token(length)[0, 0, tokens]
    slots = torch.nn.functional.pad(side.slots[0, 0], (0, -side.slots.shape[-1] % size), value=-1)
    slots = slots.view(-1, size)[picked].long()
    real = (slots >= 0).float()[..., None]
    queries = slots.clamp(min=0).flatten()
    exact = rows.unit_mass(cut.k, inputs.q, inputs.k, queries, inputs.scale, inputs.bias)
    exact = exact / exact.sum(-1, keepdim=True)
    exact = (exact.unflatten(2, slots.shape) * real).sum(3) / real.sum(1)
    means = inputs.q[:, queries].transpose(1, 2).float().unflatten(2, slots.shape)
    means = (means * real).sum(3) / real.sum(1)
    logits = means @ grid_means(cut.k, inputs.k).mT * inputs.scale + grid_weights(cut.k)[..., None, :].log()
    pooled = logits.softmax(-1)
    middle = (exact + pooled) / 2
    apart = (_information(exact, middle) + _information(pooled, middle)) / 2
    return apart.clamp(min=0).sqrt().amax(-1)


def _information(share: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return the sum of share * ln(share / of) over the last axis, 0 where there is no share."""
    return (torch.xlogy(share, share) - torch.xlogy(share, of)).sum(-1)
