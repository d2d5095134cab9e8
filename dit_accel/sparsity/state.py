"""What a recipe keeps between steps, in bytes, said before anything is allocated."""

from __future__ import annotations

from ..config import ImportanceOrder, KMeansOrder, MassScore, Recipe, ResidualCorrect
from ..kernels.block_sparse import COARSE_QUERIES, FINE_KEYS
from ..layout import Grid, TokenLayout
from .content import clusters
from .decide import option, seen_as, tiling_for
from .drift import PROBES


def state_bytes(recipe: Recipe, layout: TokenLayout, batch: int, heads: int, dim: int, itemsize: int = 4) -> int:
    """Return the most bytes that a recipe keeps per attention site and guidance branch between steps.

    A bit for each unit pair of each sample and head, and where heads lie apart their slots; for k-means the
    centroids, float32, of `dim` channels; for cached log-sum-exps a float32 for each query, for residuals that and an
    output of `itemsize`.
    """
    layout = seen_as(recipe, layout)
    total = _of_decisions(recipe, layout, batch, heads, dim)
    if isinstance(recipe.score, MassScore) and recipe.score.cached and recipe.heads is None:
        tiling = tiling_for(recipe, layout)
        total += batch * heads * 4 * tiling.unit * int(tiling.grid.sum())
    if isinstance(recipe.correct, ResidualCorrect):
        total += batch * heads * layout.length * (dim * itemsize + 4)
    if recipe.drift is not None:
        total += batch * 2 * heads * dim * itemsize * min(PROBES, layout.length - layout.text)
    return total


def _of_decisions(recipe: Recipe, layout: TokenLayout, batch: int, heads: int, dim: int) -> int:
    if not recipe.reuses and not isinstance(recipe.order, KMeansOrder):
        return 0
    if recipe.heads is not None:
        sizes = [tiling_for(option(recipe, i), layout) for i in range(len(recipe.heads.options))]
        units = max(tiling.units for tiling in sizes)
        slots, lying = units * sizes[0].unit, 0
        if any(tiling is not sizes[0] for tiling in sizes):  # else all heads lie alike
            lying = _lying(slots, slots // sizes[0].block_q) + _lying(slots, slots // sizes[0].block_k)
        return batch * heads * (units * -(-units // 8) + lying) + batch * heads
    tiling = tiling_for(recipe, layout)
    if isinstance(recipe.order, KMeansOrder):
        return batch * heads * _of_clusters(recipe, recipe.order, layout, dim)
    bits = tiling.units * -(-tiling.units * tiling.key_parts // 8)
    if not isinstance(recipe.order, ImportanceOrder):
        return batch * heads * bits
    # sorted runs may end ragged at each segment, so each unit may need a block of its own beside the tokens
    blocks, units = _blocks(layout, tiling.units, tiling.block_k)
    return batch * heads * (tiling.units * -(-units // 8) + _lying(blocks * tiling.block_k, blocks))


def _of_clusters(recipe: Recipe, order: KMeansOrder, layout: TokenLayout, dim: int) -> int:
    tiling = tiling_for(recipe, layout)
    queries, keys = clusters(layout, order)
    total = (queries + keys) * dim * 4
    if not recipe.reuses:
        return total
    # which blocks clusters are cut into depends on the device
    return total + max(
        _of_cut_clusters(layout, queries, keys, tiling.block_q, min(tiling.block_k, FINE_KEYS)),
        _of_cut_clusters(layout, queries, keys, min(tiling.block_q, COARSE_QUERIES), tiling.block_k),
    )


def _of_cut_clusters(layout: TokenLayout, queries: int, keys: int, block_q: int, block_k: int) -> int:
    blocks_q, units_q = _blocks(layout, queries, block_q)
    blocks_k, units_k = _blocks(layout, keys, block_k)
    return units_q * -(-units_k // 8) + _lying(blocks_q * block_q, blocks_q) + _lying(blocks_k * block_k, blocks_k)


def _blocks(layout: TokenLayout, units: int, block: int) -> tuple[int, int]:
    """Return how many blocks and units a side cut by content has at most."""
    cells = layout.length - layout.text
    words = sum(-(-s.length // block) for _, s in layout.spans() if not isinstance(s, Grid))
    return (cells + units * (block - 1)) // block + words, units + words


def _lying(slots: int, blocks: int) -> int:
    """Return the bytes of one head's slots, owners and token counts."""
    return 4 * slots + 16 * blocks
