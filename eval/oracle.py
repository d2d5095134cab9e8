"""The best units of one order at a density: chosen by the true attention mass between them, at every call."""

from __future__ import annotations

import torch

from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.sparsity.decide import grid_share, tiling_for
from dit_accel.sparsity.plan import Plan, from_units
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.tiling import Tiling
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
        slots = tiling.on(call.q.device).slots[None, None]
        mass = block_mass(call, slots, slots, tiling.unit, tiling.unit)
        return from_units(best_units(mass, tiling, self._density), tiling.on(call.q.device).cut)


def best_units(mass: torch.Tensor, tiling: Tiling, density: float) -> torch.Tensor:
    """Return the unit mask, bool [B, H, units, units], of most `mass` a pair at a density over all pairs."""
    uploaded = tiling.on(mass.device)
    grid, tokens = uploaded.grid_units, uploaded.tokens
    pairs = (tokens[grid, None] * tokens[grid]).flatten()
    worth = (mass[..., grid[:, None], grid[None]].flatten(-2) / pairs).nan_to_num(nan=float("inf"))
    order = worth.argsort(dim=-1, descending=True, stable=True)
    spent = pairs.expand_as(worth).gather(-1, order)
    taken = spent.cumsum(-1) - spent / 2 <= grid_share(tiling.layout, density) * pairs.sum()
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken).unflatten(-1, (len(grid), len(grid)))
    mask = torch.ones(*mass.shape[:2], tiling.units, tiling.units, dtype=torch.bool, device=mass.device)
    mask[..., grid[:, None], grid[None]] = chosen | _own(chosen)
    return mask


def _own(chosen: torch.Tensor) -> torch.Tensor:
    """Give rows that nothing was chosen for their own unit: a query must see a key."""
    empty = ~chosen.any(-1, keepdim=True)
    return empty & torch.eye(chosen.shape[-1], dtype=torch.bool, device=chosen.device)
