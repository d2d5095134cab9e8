"""Axis 1 by content: orders that follow the queries and keys, each batch row and head its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..config import ImportanceOrder, KMeansOrder
from ..kernels.cocluster import cocluster
from ..kernels.kmeans import kmeans
from ..layout import Grid, TokenLayout
from . import rows
from .cut import Cut, Places, Side, from_sorted, places
from .tiling import Tiling

TOKENS_PER_QUERY_CLUSTER, TOKENS_PER_KEY_CLUSTER = 32, 16  # the least there are on average


@dataclass(frozen=True, eq=False)
class Centroids:
    """Where the next decision of the same run starts: float [B, H, clusters, D] each."""

    q: torch.Tensor
    k: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.q, self.k))


def by_importance(
    tiling: Tiling,
    order: ImportanceOrder,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> Cut:
    """Sort the grid's keys by the mean attention of sampled queries, best first; the queries stay as tiled.

    PBS-Attn, Wang et al. 2025, arXiv 2510.21270, sorts inside segments by the last block of queries, as causal models
    must. Here the sampled queries are spread over the grid and the segment may be the whole grid; text is not sorted.
    """
    mass = rows.key_mass(q, k, rows.sample(tiling.layout, order.rows, q.device), scale, bias)
    curve = grid_tokens(tiling, q.device)
    n = len(curve)
    segment = min(order.segment or n, n)
    along = mass[..., curve]
    if segment < n:
        padded = torch.nn.functional.pad(along, (0, -n % segment), value=float("-inf")).unflatten(-1, (-1, segment))
        place = padded.argsort(dim=-1, descending=True, stable=True)
        place = (place + torch.arange(0, place.shape[-2], device=q.device)[:, None] * segment).flatten(-2)[..., :n]
    else:
        place = along.argsort(dim=-1, descending=True, stable=True)
    cut = tiling.on(q.device).cut
    return Cut(tiling.layout.length, cut.q, _sorted_keys(tiling, segment, q.device).lay(curve.int()[place]))


@lru_cache(maxsize=64)
def _sorted_keys(tiling: Tiling, segment: int, device: torch.device) -> Places:
    """Return how sorted keys lie in units: the sizes of the units depend on the layout alone."""
    n = len(grid_tokens(tiling, device))
    sizes, text = _segment_sizes(n, segment, tiling.unit, device), _text_slots(tiling.layout, tiling.block_k, device)
    return places(sizes, n, tiling.block_k, text)


@lru_cache(maxsize=64)
def _segment_sizes(n: int, segment: int, unit: int, device: torch.device) -> torch.Tensor:
    """Return the tokens of each unit where `n` tokens are cut into segments and those into units, [1, 1, units]."""
    sizes = [min(unit, segment - at) for at in range(0, segment, unit)] * (n // segment)
    sizes += [min(unit, n % segment - at) for at in range(0, n % segment, unit)]
    return torch.tensor(sizes, device=device)[None, None]


@lru_cache(maxsize=64)
def grid_tokens(tiling: Tiling, device: torch.device) -> torch.Tensor:
    """Return the grid's tokens in the tiling's order, int64 [tokens]."""
    slots = tiling.slots.reshape(tiling.units, -1)[tiling.grid].reshape(-1)
    return torch.from_numpy(slots[slots >= 0].astype(np.int64)).to(device)


@lru_cache(maxsize=64)
def text_tokens(layout: TokenLayout, device: torch.device) -> torch.Tensor:
    """Return the tokens that lie on no grid, int64 [tokens]."""
    slots = _text_slots(layout, 16, torch.device("cpu"))
    return slots[slots >= 0].long().to(device)


@lru_cache(maxsize=64)
def _text_slots(layout: TokenLayout, block: int, device: torch.device) -> torch.Tensor:
    """Return the text in blocks, int32 [blocks * block], -1 where a block is not full."""
    pieces = [np.empty(0, dtype=np.int32)]
    for start, segment in layout.spans():
        if not isinstance(segment, Grid):
            words = np.full(-(-segment.length // block) * block, -1, dtype=np.int32)
            words[: segment.length] = np.arange(start, start + segment.length)
            pieces.append(words)
    return torch.from_numpy(np.concatenate(pieces)).to(device)


def by_clusters(
    tiling: Tiling,
    order: KMeansOrder,
    q: torch.Tensor,
    k: torch.Tensor,
    warm: Centroids | None,
    blocks: tuple[int, int],
) -> tuple[Cut, Centroids]:
    """Cluster the grid's queries and keys, each cluster a unit, and return where the next decision may start.

    Clusters of queries and of keys are cut into `blocks` of so many tokens, whose last ones are padded.

    Sparse VideoGen 2, Yang et al. 2025, arXiv 2505.18875. There the first centroids are random tokens and both guidance
    branches of a batch of one share them; here they are evenly spaced tokens and belong to one branch and batch row.
    `joint` clusters them together, SVOO, arXiv 2603.18636.
    """
    tokens = grid_tokens(tiling, q.device)
    iterations = order.first if warm is None else order.later
    counts, sides = clusters(tiling.layout, order), (q[:, tokens].transpose(1, 2), k[:, tokens].transpose(1, 2))
    start = (warm.q, warm.k) if warm else None
    if order.joint:
        queries, keys = cocluster(*sides, counts, iterations, start)
    else:
        both = zip(sides, counts, start or (None, None), strict=True)
        queries, keys = (kmeans(x, count, iterations, begin) for x, count, begin in both)
    cut = Cut(
        tiling.layout.length,
        _cluster_side(tokens, queries, blocks[0], tiling.layout),
        _cluster_side(tokens, keys, blocks[1], tiling.layout),
    )
    return cut, Centroids(queries[1], keys[1])


def _cluster_side(
    tokens: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], block: int, layout: TokenLayout
) -> Side:
    """Cut tokens into their clusters, given labels, means and sizes."""
    labels, means, sizes = found
    laid = tokens[labels.argsort(dim=-1, stable=True)].int()
    return from_sorted(laid, sizes, block, _text_slots(layout, block, tokens.device), means)


def clusters(layout: TokenLayout, order: KMeansOrder) -> tuple[int, int]:
    """Return how many query and key clusters a layout gets: the asked ones, fewer where the grid is small."""
    n = layout.length - layout.text
    return (
        min(order.queries, max(n // TOKENS_PER_QUERY_CLUSTER, 1)),
        min(order.keys, max(n // TOKENS_PER_KEY_CLUSTER, 1)),
    )
