"""Heads that choose: each takes the option that loses least on sampled exact rows."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..config import HeadChoice
from . import rows
from .cut import Cut, Side
from .inputs import Inputs
from .trust import divergence


def choose(
    config: HeadChoice, options: list[tuple[Cut, torch.Tensor]], inputs: Inputs
) -> tuple[Cut, torch.Tensor, torch.Tensor]:
    """Return the cut and unit mask in which each head has its own option, and which heads compute nothing.

    Sparse VideoGen, Xi et al. 2025, chooses between two bands by the output's mean squared error on 64 rows at every
    call; Sparse-vDiT, Chen et al. 2025, among five patterns by error and cost, offline; MoA, Fu et al. 2024, and
    DuoAttention, Xiao et al. 2024, divide a budget among heads. All have one form here: the least loss + price x
    density, over rows spread over the grid, the price given or such that it spends the budget. A head of which every
    option loses more than the limit, or whose losses are not finite, computes everything. FlexPrefill, Lai et al. 2025,
    looks at no loss: the first option where the pooled score it stands on can be trusted, else the second.
    """
    best = _best(config, options, inputs)
    everything = options[0][0]
    options = [*options, (everything, torch.ones_like(options[0][1]))]
    cut = _merged([cut for cut, _ in options], best)
    mask = _pick([_grown(mask, cut.q.units, cut.k.units) for _, mask in options], best)
    return cut, mask, ~mask.any(-1).any(-1)


@lru_cache(maxsize=4096)
def takers(given: tuple[int, ...], device: torch.device) -> dict[int, torch.Tensor]:
    """Return the heads, int64, that are given each number, uploaded once."""
    return {
        number: torch.tensor([head for head, its in enumerate(given) if its == number], device=device)
        for number in sorted(set(given))
    }


def assembled(
    parts: list[tuple[torch.Tensor, Cut, torch.Tensor]], heads: int
) -> tuple[Cut, torch.Tensor, torch.Tensor]:
    """Return the cut and unit mask of all heads, and which compute nothing, from those of disjoint groups of heads.

    `parts`: heads int64 [n], how they lie, and their mask, bool [B|1, n|1, query units, key units].
    """
    cuts = [cut for _, cut, _ in parts]
    which = torch.zeros(1, heads, dtype=torch.int64, device=parts[0][0].device)
    for number, (at, _, _) in enumerate(parts):
        which.index_fill_(1, at, number)
    cut = cuts[0] if all(cut is cuts[0] for cut in cuts) else _merged(cuts, which)
    batch = max(mask.shape[0] for _, _, mask in parts)
    out = torch.zeros(batch, heads, cut.q.units, cut.k.units, dtype=torch.bool, device=which.device)
    for at, _, mask in parts:
        out.index_copy_(1, at, _grown(mask, cut.q.units, cut.k.units).expand(batch, len(at), -1, -1))
    return cut, out, ~out.any(-1).any(-1)


def _best(config: HeadChoice, options: list[tuple[Cut, torch.Tensor]], inputs: Inputs) -> torch.Tensor:
    """Return the number of the option each head takes, int64 [B, H]; one more than the last is everything."""
    if config.trust is not None:
        return _trusted(config.trust, divergence(options[0][0], inputs, config.rows))
    losses, computed = measured(config, options, inputs)
    price = config.price if config.budget is None else _price(losses, computed, config.budget)
    best = (losses + price * computed).argmin(0)
    unsure = ~torch.isfinite(losses).all(0)
    if config.limit is not None:
        unsure |= (losses > config.limit).all(0)
    return torch.where(unsure, len(options), best)


def _trusted(limit: float, apart: torch.Tensor) -> torch.Tensor:
    """Return 0 where the pooled score can be trusted, 1 where not, 2 (everything) where that cannot be told, [B, H]."""
    return torch.where(torch.isfinite(apart), (apart >= limit).long(), 2)


def measured(
    config: HeadChoice, options: list[tuple[Cut, torch.Tensor]], inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each option loses and which share of all pairs it computes, float32 [options, B, H] both."""
    losses = torch.stack(_losses(config, options, inputs))
    return losses, torch.stack([_density(cut, mask).expand_as(losses[0]) for cut, mask in options])


def _price(losses: torch.Tensor, computed: torch.Tensor, budget: float) -> torch.Tensor:
    """Find the price of density at which the heads of each sample come nearest to the budget, [B, 1], by bisection.

    At any price the choice is the best one of its own cost, so no head could be served better for the same total.
    """
    low = torch.full_like(losses[0, :, :1], 1e-6)
    high = torch.full_like(low, 1e6)

    def spent(price: torch.Tensor) -> torch.Tensor:
        best = (losses + price * computed).argmin(0, keepdim=True)
        return computed.gather(0, best)[0].mean(-1, keepdim=True)

    for _ in range(32):
        middle = (low * high).sqrt()
        over = spent(middle) > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return torch.where(spent(low) - budget < budget - spent(high), low, high)


def _losses(config: HeadChoice, options: list[tuple[Cut, torch.Tensor]], inputs: Inputs) -> list[torch.Tensor]:
    """Return what each option loses on the sampled rows, float32 [B, H] each."""
    sampled = rows.sample(inputs.layout, config.rows, inputs.q.device)
    values = inputs.v.transpose(1, 2).float()
    lost = [torch.zeros(values.shape[:2], device=values.device) for _ in options]
    whole = torch.zeros_like(lost[0])
    # the options lie alike for all samples and heads
    owners = [[side.unit_of_token(cut.length)[0, 0] for side in (cut.q, cut.k)] for cut, _ in options]
    for run, weights in rows.attention(inputs.q, inputs.k, sampled, inputs.scale, inputs.bias):
        exact = weights @ values
        whole += exact.square().sum((-1, -2)) if config.loss == "output" else len(run)
        for total, (_, mask), (query, key) in zip(lost, options, owners, strict=True):
            kept = weights * mask[:, :, query[run]][..., key]
            held = kept.sum(-1, keepdim=True)
            if config.loss == "mass":
                total += (1 - held).sum((-1, -2))
            else:
                out = kept @ values / held.clamp(min=torch.finfo(held.dtype).tiny)
                total += (out - exact).square().sum((-1, -2))
    return [total / whole.clamp(min=torch.finfo(whole.dtype).tiny) for total in lost]


def _density(cut: Cut, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of all pairs that a unit mask computes, float32 [B|1, H|1]."""
    queries, keys = cut.q.weights[..., None], cut.k.weights[..., None, :]
    return (mask * queries * keys).sum((-1, -2)) / cut.length**2


def _grown(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, keys - mask.shape[-1], 0, queries - mask.shape[-2]))


def _merged(cuts: list[Cut], best: torch.Tensor) -> Cut:
    if all(cut is cuts[0] for cut in cuts):
        return cuts[0]  # all heads lie alike, whatever they take
    return Cut(cuts[0].length, _merge([cut.q for cut in cuts], best), _merge([cut.k for cut in cuts], best))


def _merge(sides: list[Side], best: torch.Tensor) -> Side:
    """Return a side that lies, for each batch row and head, as the chosen one does; spare blocks hold no token."""
    blocks = max(side.owner.shape[-1] for side in sides)
    block = sides[0].block

    def grown(x: torch.Tensor, length: int, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=value)

    return Side(
        block=block,
        units=max(side.units for side in sides),
        slots=_pick([grown(side.slots, blocks * block, -1) for side in sides], best),
        owner=_pick([grown(side.owner, blocks, side.units - 1) for side in sides], best),
        tokens=_pick([grown(side.tokens, blocks, 0) for side in sides], best),
        grid=sides[0].grid,
        span=sides[0].span,
    )


def _pick(choices: list[torch.Tensor], best: torch.Tensor) -> torch.Tensor:
    """Take for each batch row and head the tensor [B|1, H|1, ...] that `best` [B, H] names."""
    shape = (*best.shape, *choices[0].shape[2:])
    out = choices[0].expand(shape)
    for i, choice in enumerate(choices[1:], start=1):
        out = torch.where((best == i).view(*best.shape, *[1] * (len(shape) - 2)), choice, out)
    return out
