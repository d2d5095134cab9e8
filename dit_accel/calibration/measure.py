"""What is measured of one attention call: the loss of each pattern, or the keys that hold most attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from ..call import AttentionCall
from ..config import HeadChoice, Recipe
from ..layout import Grid, TokenLayout
from ..sparsity import heads, rows
from ..sparsity.decide import decide, option, seen_as
from ..sparsity.inputs import Inputs

COVERED = 0.95  # of a query's attention to the grid: SVOO, arXiv 2603.18636

Measure = Callable[[AttentionCall], torch.Tensor]


def patterns(recipe: Recipe, choice: HeadChoice, count: int) -> Measure:
    """Return what measures the losses and costs of patterns, [2, patterns, H], means over the batch of a call.

    On `count` exact queries spread over the grid: the loss is what `choice.loss` says, the cost the share of all pairs.
    """
    choice = choice.model_copy(update={"rows": count, "given": ()})
    recipe = recipe.model_copy(update={"heads": choice, "search": None})

    def measure(call: AttentionCall) -> torch.Tensor:
        inputs = Inputs(seen_as(recipe, call.layout), call.q, call.k, call.v, call.scale, call.key_bias)
        made = [decide(option(recipe, number), inputs) for number in range(len(choice.options))]
        losses, costs = heads.measured(choice, [(one.cut, one.mask) for one in made], inputs)
        return torch.stack([losses.mean(1), costs.mean(1)])

    return measure


def coverage(count: int) -> Measure:
    """Return what measures the fewest keys of the grid that hold most attention of a query to it, as a share, [H].

    SVOO, arXiv 2603.18636: keys that cover 95 % of a row, here of its attention to the grid, because text is always
    computed; mean over `count` queries spread over the grid and the batch. A row that is not finite counts as all keys.
    """

    def measure(call: AttentionCall) -> torch.Tensor:
        sampled = rows.sample(call.layout, count, call.q.device)
        grid = _grid(call.layout, call.q.device)
        total = torch.zeros(call.q.shape[2], device=call.q.device)
        for _, weights in rows.attention(call.q, call.k, sampled, call.scale, call.key_bias):
            mass = weights.index_select(-1, grid)
            mass = mass / mass.sum(-1, keepdim=True)
            ordered = mass.sort(-1, descending=True).values
            needed = (ordered.cumsum(-1) - ordered < COVERED).float().mean(-1)
            total += torch.where(mass.isfinite().all(-1), needed, 1).sum((0, 2))
        return total / (len(sampled) * call.q.shape[0])

    return measure


@lru_cache(maxsize=64)
def _grid(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Return the tokens that lie on a grid, int64."""
    runs = [torch.arange(start, start + part.length) for start, part in layout.spans() if isinstance(part, Grid)]
    return torch.cat(runs).to(device)
