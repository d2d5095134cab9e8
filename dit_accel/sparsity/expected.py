"""What density a recipe comes to on a layout, as far as that is known before any query, and why not the asked one."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..config import AgentSelect, ErrorSelect, ImportanceOrder, KMeansOrder, Recipe, TopPSelect
from ..layout import TokenLayout
from . import content, papers, shapes
from .decide import grid_share, keep_mask, option, seen_as, tiling_for


@lru_cache(maxsize=256)
def budget_density(recipe: Recipe, layout: TokenLayout) -> float | None:
    """Return what a recipe that follows the content comes to on a layout, None where no budget says it.

    No less than what it keeps, nor than what each row takes for its score; these may be the same pairs, or others.
    """
    choice, asked, layout = recipe.heads, recipe.density, seen_as(recipe, layout)
    if choice is None or not any(o.select.geometric for o in choice.options):
        return None if asked is None else max(asked, _kept_density(recipe, layout), _scored_density(recipe, layout))
    sizes = _option_sizes(recipe, layout)
    if choice.budget is not None:
        return max(choice.budget, sizes[0])
    alike = all(o.select.geometric for o in choice.options) and sizes[-1] <= 1.05 * sizes[0]
    return sizes[0] if alike else None  # else it is for each head to take one size or another


def floor_note(recipe: Recipe, layout: TokenLayout, heads: int) -> str:
    """Say in plain words when the asked density cannot be met on this layout by so many heads, else ''."""
    asked, layout = recipe.density, seen_as(recipe, layout)
    if asked is None:
        return ""
    cells = layout.length - layout.text
    least, scored = _kept_density(recipe, layout), _scored_density(recipe, layout)
    floor = _floor(recipe, layout)
    if scored > least and scored > asked:
        return _floor_note(asked, floor)
    if asked < least and not layout.text:
        return f"asked density {asked:g}, the least here is {least:.2f}: kept blocks always take it; use smaller tiles"
    if asked < least:
        text_share = 1 - (cells / layout.length) ** 2
        return (
            f"asked density {asked:g}, the least here is {least:.2f}: {layout.text} text tokens beside {cells} "
            f"always take {text_share:.2f}, the kept blocks the rest; use a shorter text length or smaller tiles"
        )
    if least + floor * (cells / layout.length) ** 2 > 1.2 * asked:  # where no row's best are among the kept
        return _floor_note(asked, floor)
    units = _key_units(recipe, layout)
    options = recipe.heads.options if recipe.heads else (recipe,)
    step = 1.0 if any(o.select.kind == "lines" for o in options) else 0.5  # half a unit, or a whole line of them
    if step / units > 0.2 * asked:
        return f"asked density {asked:g}: {cells} tokens make only {units} key units, so it is met roughly"
    if recipe.heads is not None and recipe.heads.given and recipe.heads.budget is not None:
        return ""  # the heads of all sites share the budget
    sizes = _option_sizes(recipe, layout)
    if not sizes:
        return ""
    met = min(sizes, key=lambda size: abs(size - asked))
    if recipe.heads is not None and recipe.heads.budget is not None and min(sizes) < asked:
        apart = max(b - a for a, b in pairwise(sizes))
        rough = apart / 2 / heads > 0.2 * asked
        return (
            f"asked density {asked:g}: {heads} heads with patterns of {_listed(sizes)} meet it roughly" if rough else ""
        )
    if abs(met / asked - 1) > 0.2:
        return f"asked density {asked:g}: the patterns of {recipe.name!r} take {_listed(sizes)} on this grid"
    return ""


def calibration_note(recipe: Recipe) -> str:
    """Say what stands in for what the recipe's paper settles offline, '' where a profile has settled it."""
    settled = (recipe.heads is not None and recipe.heads.given) or isinstance(getattr(recipe.select, "least", 0), tuple)
    default = next((papers.WITHOUT_PROFILE[paper] for paper in recipe.sources if paper in papers.WITHOUT_PROFILE), "")
    return f"not calibrated: {default}" if default and not settled else ""


@lru_cache(maxsize=256)
def plan_note(recipe: Recipe, layout: TokenLayout, heads: int) -> str:
    """Say all that is to be said of a plan by content before it is made, '' where nothing."""
    return joined(floor_note(recipe, layout, heads), calibration_note(recipe))


def joined(*notes: str) -> str:
    """Return the notes that say something as one."""
    return "; ".join(note for note in notes if note)


def _floor_note(asked: float, floor: float) -> str:
    return (
        f"asked density {asked:g}: each row takes at least {floor:g} of its units for their score, "
        "beside kept ones; set a lower `least`"
    )


@lru_cache(maxsize=256)  # asked at every decision
def _kept_density(recipe: Recipe, layout: TokenLayout) -> float:
    """Return what is computed whatever its score: text with everything, and what the recipe keeps."""
    return _text_density(recipe, layout) + _kept_pairs(recipe, layout) / layout.length**2


def _scored_density(recipe: Recipe, layout: TokenLayout) -> float:
    """Return what text and each row's floor take together."""
    return _text_density(recipe, layout) + _floor(recipe, layout) * ((layout.length - layout.text) / layout.length) ** 2


def _text_density(recipe: Recipe, layout: TokenLayout) -> float:
    return 0.0 if recipe.skips_text else 1 - ((layout.length - layout.text) / layout.length) ** 2


def _floor(recipe: Recipe, layout: TokenLayout) -> float:
    """Return the share of a row's keys that is computed for its score even where the budget is spent."""
    select = recipe.select
    if recipe.heads is not None or not isinstance(select, TopPSelect | ErrorSelect):
        return 0.0
    least = sum(select.least) / len(select.least) if isinstance(select.least, tuple) else select.least  # of heads
    if isinstance(select, TopPSelect):
        return least
    return min(least, grid_share(layout, select.density or 0.0) / 2)


def _listed(sizes: list[float]) -> str:
    return ", ".join(f"{size:.2f}" for size in sizes)


def _key_units(recipe: Recipe, layout: TokenLayout) -> int:
    if isinstance(recipe.select, AgentSelect):
        return layout.length  # agents are counted one by one
    if isinstance(recipe.order, KMeansOrder):
        return content.clusters(layout, recipe.order)[1]
    tiles = tiling_for(recipe if recipe.heads is None else option(recipe, 0), layout)
    return int(tiles.grid.sum())


def _option_sizes(recipe: Recipe, layout: TokenLayout) -> list[float]:
    """Return the densities of the patterns of places among which heads choose, smallest first."""
    if recipe.heads is None:
        return []
    cells, sizes = layout.length - layout.text, set[float]()
    for index in range(len(recipe.heads.options)):
        here = option(recipe, index)
        if here.select.geometric:
            tiles = tiling_for(here, layout)
            share = None if here.select.asked is None else grid_share(layout, here.select.asked)
            mask = shapes.unit_mask(tiles, here.select, share)
            keep = keep_mask(tiles, recipe.keeps, torch.device("cpu")).numpy()[tiles.grid][:, tiles.grid]
            got = shapes.share_of(mask | keep, shapes.sizes(tiles))
            skipped = here.select.kind == "none" and recipe.skips_text
            sizes.add(0.0 if skipped else 1 + (got - 1) * (cells / layout.length) ** 2)
    return sorted(sizes)


def _kept_pairs(recipe: Recipe, layout: TokenLayout) -> float:
    """Count the grid's token pairs that are computed whatever their score."""
    if isinstance(recipe.order, ImportanceOrder | KMeansOrder):
        return 0.0
    tiling = tiling_for(recipe, layout)
    keep = keep_mask(tiling, recipe.keeps, torch.device("cpu")).numpy()[tiling.grid][:, tiling.grid]
    tokens = tiling.tokens[tiling.grid]
    return float((keep * np.outer(tokens, tokens)).sum())
