"""Run a recipe's axes once: layout, queries and keys in, how the tokens lie and which unit pairs are computed out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import (
    CumulativeSelect,
    ErrorSelect,
    GilbertOrder,
    HeadChoice,
    ImportanceOrder,
    Keeps,
    KMeansOrder,
    LinesSelect,
    LowBitScore,
    MassScore,
    NeighborhoodSelect,
    PercentileSelect,
    RasterOrder,
    Recipe,
    SampledScore,
    Score,
    Select,
    StaticOrder,
    ThresholdSelect,
    TopKSelect,
    TopPSelect,
    TreeScore,
    WithinSelect,
)
from ..errors import PlanError
from ..kernels.block_sparse import cluster_blocks
from ..layout import TokenLayout
from . import cached, content, error, frames, heads, lines, lowbit, selectors, shapes, tree
from .adjacency import adjacent
from .cached import Reference
from .content import Centroids
from .cut import Cut
from .inputs import Inputs, Warm
from .scores import Scene, grid_weights, score
from .tiling import Tiling, tiling


@dataclass(frozen=True, eq=False)
class Decision:
    """Which unit pairs are computed, bool [B|1, H|1, query units, key units], and how the tokens lie in units.

    `skip_heads` bool [B|1, H]: heads that compute nothing on purpose. `warm`: where the next decision may start.
    """

    cut: Cut
    mask: torch.Tensor
    skip_heads: torch.Tensor | None = None
    warm: Warm | None = None


def tiling_for(recipe: Recipe, layout: TokenLayout) -> Tiling:
    """Return the recipe's static cut of a layout (cached); content orders start from a Gilbert curve."""
    dilation = recipe.select.dilation if isinstance(recipe.select, NeighborhoodSelect) else (1, 1, 1)
    per_tile = isinstance(recipe.select, NeighborhoodSelect) and recipe.select.per == "tile"
    dilation = (1, 1, 1) if per_tile else dilation
    return tiling(seen_as(recipe, layout), _static(recipe), recipe.block_q, recipe.block_k, dilation)


def seen_as(recipe: Recipe, layout: TokenLayout) -> TokenLayout:
    """Return a layout as a recipe sees it: with words among what it ranks, where it does."""
    return layout.with_text_ranked if recipe.ranks_text else layout


def _static(recipe: Recipe) -> StaticOrder:
    order = recipe.order
    if isinstance(order, ImportanceOrder):
        return GilbertOrder()
    return RasterOrder() if isinstance(order, KMeansOrder) else order


def decide(recipe: Recipe, inputs: Inputs) -> Decision:
    """Return what a recipe computes. Text rows and columns are always computed; it chooses among grid pairs.

    The layout of `inputs` is the one that the recipe sees.
    """
    if recipe.heads is not None:
        choose = _as_given if recipe.heads.given else _by_loss
        return choose(recipe, recipe.heads, inputs)
    tiles, device = tiling_for(recipe, inputs.layout), inputs.q.device
    if recipe.select.geometric:
        mask = _by_place(tiles, recipe.select, recipe.keeps, device)
        skipped = recipe.select.kind == "none" and recipe.skips_text
        return Decision(tiles.on(device).cut, torch.zeros_like(mask) if skipped else mask)
    cut, warm = _cut(recipe, tiles, inputs)
    keep = _grid_keep(tiles, recipe.keeps, device)
    if isinstance(recipe.order, ImportanceOrder | KMeansOrder):
        keep = _nothing(device).expand(len(cut.q.grid), len(cut.k.grid))
    scene = Scene(tiles, cut, inputs.q, inputs.k, inputs.scale, inputs.bias)
    chosen, reference = _by_score(recipe, scene, inputs, keep)
    return Decision(cut, with_text(chosen, cut), warm=warm or reference)


def with_text(chosen: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Add the rows and columns of text, all of them computed, to a mask over grid units."""
    if chosen.shape[-2:] == (cut.q.units, cut.k.units):
        return chosen
    mask = torch.ones(*chosen.shape[:2], cut.q.units, cut.k.units, dtype=torch.bool, device=chosen.device)
    if cut.q.span is not None and cut.k.span is not None:
        mask[..., slice(*cut.q.span), slice(*cut.k.span)] = chosen
    else:
        mask[..., cut.q.grid[:, None], cut.k.grid] = chosen
    return mask


def _by_loss(recipe: Recipe, choice: HeadChoice, inputs: Inputs) -> Decision:
    """Decide every pattern for all heads, and let each head take one."""
    made = [decide(option(recipe, i), inputs) for i in range(len(choice.options))]
    cut, mask, skip = heads.choose(choice, [(one.cut, one.mask) for one in made], inputs)
    return Decision(cut, mask, skip_heads=skip)


def _as_given(recipe: Recipe, choice: HeadChoice, inputs: Inputs) -> Decision:
    """Decide each pattern for the heads that are told to take it, and for no others."""
    if len(choice.given) != (count := inputs.q.shape[2]):
        raise PlanError(f"heads.given names options for {len(choice.given)} heads, but the attention has {count}.")
    taken = heads.takers(choice.given, inputs.q.device)
    made = {}
    for number, at in taken.items():
        if number not in choice.whole:
            here = option(recipe, number)
            one = decide(here, inputs.of_heads(at) if here.content_driven else inputs)
            made[number] = (one.cut, one.mask)
    first = next(iter(made.values()), None)
    cut = tiling_for(option(recipe, 0), inputs.layout).on(inputs.q.device).cut if first is None else first[0]
    everything = torch.ones(1, 1, cut.q.units, cut.k.units, dtype=torch.bool, device=inputs.q.device)
    parts = [(at, *made.get(number, (cut, everything))) for number, at in taken.items()]
    return Decision(*heads.assembled(parts, count))


@lru_cache(maxsize=4096)
def option(recipe: Recipe, index: int) -> Recipe:
    """Return the recipe that a head follows when it takes one option."""
    assert recipe.heads is not None
    chosen = recipe.heads.options[index]
    # built without checks: 'none' may stand in an option only, and the recipe was checked as a whole
    return recipe.model_copy(
        update={"heads": None, "order": chosen.order, "score": chosen.score, "select": chosen.select}
    )


def _cut(recipe: Recipe, tiles: Tiling, inputs: Inputs) -> tuple[Cut, Warm | None]:
    if isinstance(recipe.order, ImportanceOrder):
        return content.by_importance(tiles, recipe.order, inputs.q, inputs.k, inputs.scale, inputs.bias), None
    if isinstance(recipe.order, KMeansOrder):
        warm = inputs.warm if isinstance(inputs.warm, Centroids) else None
        biased, precision = inputs.bias is not None, recipe.precision
        blocks = cluster_blocks(inputs.q, tiles.block_q, tiles.block_k, biased=biased, precision=precision)
        return content.by_clusters(tiles, recipe.order, inputs.q, inputs.k, warm, blocks)
    return tiles.on(inputs.q.device).cut, None


def _by_score(
    recipe: Recipe, scene: Scene, inputs: Inputs, keep: torch.Tensor
) -> tuple[torch.Tensor, Reference | None]:
    """Run the recipe's score and its selection, bool over grid units, and return what a later score may start from."""
    select = recipe.select
    share = None if select.asked is None else grid_share(inputs.layout, select.asked)
    if isinstance(select, LinesSelect) and isinstance(recipe.score, SampledScore):
        return lines.select(scene, recipe.score.rows, keep, share or 0.0, select), None
    if isinstance(select, ErrorSelect) and share is not None:  # by the errors alone
        return error.of_density(scene, inputs.v, keep, share, _least(select.least, inputs)), None
    worth, reference = _worth(recipe.score, scene, inputs, keep)
    if isinstance(select, ErrorSelect):
        return error.select(scene, inputs.v, worth, keep, select.p, _least(select.least, inputs)), reference
    return _select(select, inputs, scene.cut, worth, keep), reference


def _worth(config: Score, scene: Scene, inputs: Inputs, keep: torch.Tensor) -> tuple[torch.Tensor, Reference | None]:
    if isinstance(config, MassScore) and config.cached:
        return cached.score(scene, inputs.warm if isinstance(inputs.warm, Reference) else None)
    if isinstance(config, TreeScore):
        return tree.score(scene, config), None
    if isinstance(config, LowBitScore):
        return lowbit.score(scene, config, inputs.v, keep), None
    return score(scene, config), None


def _select(select: Select, inputs: Inputs, cut: Cut, worth: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    rows, cols = grid_weights(cut.q), grid_weights(cut.k)
    if isinstance(select, WithinSelect):
        return selectors.within(worth, keep, select.radius)
    if isinstance(select, CumulativeSelect):
        return selectors.cumulative(worth, keep, select.p, select.rescale)
    if isinstance(select, ThresholdSelect):
        return selectors.threshold(worth, keep, math.log(select.above))
    if isinstance(select, TopPSelect) and select.density is None:
        return selectors.top_p(worth, keep, select.p, _least(select.least, inputs))
    assert select.asked is not None
    share = grid_share(inputs.layout, select.asked)
    if isinstance(select, TopPSelect):
        return selectors.top_p_of_density(worth, keep, rows, cols, share, _least(select.least, inputs))
    if isinstance(select, TopKSelect):
        return selectors.top_k(worth, keep, cols, share, select.spread)
    assert isinstance(select, PercentileSelect)
    return selectors.percentile(worth, keep, rows, cols, share)


def _least(least: float | tuple[float, ...], inputs: Inputs) -> float | torch.Tensor:
    """Return a floor as the selectors take it: a number for all heads, or one for each, uploaded once."""
    if not isinstance(least, tuple):
        return least
    if len(least) != (heads := inputs.q.shape[2]):
        raise PlanError(f"select.least has numbers for {len(least)} heads, but the attention has {heads}.")
    return _uploaded(least, inputs.q.device)


@lru_cache(maxsize=4096)
def _uploaded(least: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(least, dtype=torch.float64, device=device).view(1, -1, 1, 1)


def grid_share(layout: TokenLayout, density: float) -> float:
    """Return which share of the grid's own pairs may be computed so that all pairs together reach `density`.

    Text rows and columns are always computed and count first; 0 when they alone are above the asked density.
    """
    cells = layout.length - layout.text
    always = layout.length**2 - cells**2
    return max(0.0, (density * layout.length**2 - always) / cells**2)


@lru_cache(maxsize=64)
def _by_place(tiles: Tiling, select: Select, keeps: Keeps, device: torch.device) -> torch.Tensor:
    """Return what a rule of places computes, bool [1, 1, units, units], made once a device."""
    share = None if select.asked is None else grid_share(tiles.layout, select.asked)
    chosen = torch.from_numpy(shapes.unit_mask(tiles, select, share)).to(device)[None, None]
    if select.kind != "none":
        chosen = chosen | _grid_keep(tiles, keeps, device)
    return with_text(chosen, tiles.on(device).cut)


@lru_cache(maxsize=64)
def _grid_keep(tiling: Tiling, keeps: Keeps, device: torch.device) -> torch.Tensor:
    """Return the grid's part of `keep_mask`, bool [query units, key units on a grid], made once a device."""
    grid = tiling.on(device).grid_units
    return keep_mask(tiling, keeps, device)[grid[:, None], grid].repeat_interleave(tiling.key_parts, -1)


@lru_cache(maxsize=16)
def _nothing(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, 1, dtype=torch.bool, device=device)


@lru_cache(maxsize=64)
def keep_mask(tiling: Tiling, keeps: Keeps, device: torch.device) -> torch.Tensor:
    """Return the unit pairs that are computed whatever their score, bool [units, units], made once a device."""
    mask = torch.zeros(tiling.units, tiling.units, dtype=torch.bool, device=device)
    if keeps.own:
        mask |= torch.eye(tiling.units, dtype=torch.bool, device=device)
    if keeps.first_frame and tiling.layout.main.frames > 1:
        mask |= torch.from_numpy(tiling.first_frame).to(device)[None]
    if keeps.own_frame:
        mask |= torch.from_numpy(frames.own_frame(tiling)).to(device)
    if keeps.own_place:
        mask |= torch.from_numpy(frames.own_place(tiling)).to(device)
    if keeps.sinks:
        mask |= torch.from_numpy(tiling.sink_rank < keeps.sinks).to(device)[None]
    if keeps.adjacent:
        mask |= torch.from_numpy(adjacent(tiling)).to(device)
    return mask
