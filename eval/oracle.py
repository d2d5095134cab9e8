"""The best units of one order at a density: chosen by the true attention mass between them, at every call."""

from __future__ import annotations

import torch

from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.sparsity.cut import Cut
from dit_accel.sparsity.decide import grid_share, tiling_for
from dit_accel.sparsity.plan import Plan, from_units
from dit_accel.sparsity.planner import Planner
from dit_accel.truth import block_mass


class OraclePlanner(Planner):
    """A planner that takes, in each head, the unit pairs with most true mass a pair until the density is reached.

    Order, tiles, dense steps and layers are the recipe's; its score, selector and keeps are not asked. Text is always
    computed, as in every recipe. It costs a dense attention a call and is a yardstick, not a method: no other choice of
    these units keeps more mass in as many pairs (but for the last unit, taken where half of it fits).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.density is None:
            raise ConfigError(f"oracle: recipe {recipe.name!r} has no density; give one.")
        self._density = recipe.density

    def plan(self, call: AttentionCall) -> Plan:
        tiling = tiling_for(self.recipe, call.layout)
        uploaded = tiling.on(call.q.device)
        slots = uploaded.slots[None, None]
        mass = block_mass(call, slots, slots, tiling.unit, tiling.unit // tiling.key_parts)
        return from_units(best_units(mass, uploaded.cut, grid_share(call.layout, self._density)), uploaded.cut)


def best_units(mass: torch.Tensor, cut: Cut, share: float) -> torch.Tensor:
    """Return the unit mask, bool [B, H, query units, key units], of most `mass` a pair at a share of the grid's pairs.

    `cut` lies all heads and samples alike.
    """
    rows, cols = cut.q.grid, cut.k.grid
    pairs = (cut.q.grid_weights[0, 0][:, None] * cut.k.grid_weights[0, 0]).flatten()
    worth = (mass[..., rows[:, None], cols].flatten(-2) / pairs.clamp(min=1)).nan_to_num(nan=float("inf"))
    order = worth.argsort(dim=-1, descending=True, stable=True)
    spent = pairs.expand_as(worth).gather(-1, order)
    taken = spent.cumsum(-1) - spent / 2 <= share * pairs.sum()
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken).unflatten(-1, (len(rows), len(cols)))
    mask = torch.ones(*mass.shape[:2], cut.q.units, cut.k.units, dtype=torch.bool, device=mass.device)
    mask[..., rows[:, None], cols] = chosen | _own(chosen)
    return mask


def _own(chosen: torch.Tensor) -> torch.Tensor:
    """Give rows that nothing was chosen for their own unit: a query must see a key."""
    rows, cols = chosen.shape[-2:]
    empty = ~chosen.any(-1, keepdim=True)
    own = torch.eye(rows, dtype=torch.bool, device=chosen.device)
    return empty & own.repeat_interleave(cols // rows, -1)
