"""Axis 2, score: how much a pair (query unit, key unit) is worth. Higher is better.

Scores are float32 [B|1, H|1, query units on a grid, key units on a grid]. A NaN or Inf in a unit makes its scores
non-finite, which selectors read as "compute it". Text is kept by rule and has no scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..config import AntidiagonalScore, ChannelScore, GeometryScore, PooledScore, SampledScore, Score, SubtileScore
from ..kernels.block_mass import block_mass
from ..kernels.block_max import block_max
from ..kernels.row_shares import unit_shares
from ..kernels.unit_means import Form, unit_means, unit_means_of_two
from . import rows
from .cut import Cut, Side
from .rows import BYTES
from .tiling import Tiling

TIE = 1e-3  # Euclidean share that orders pairs of equal rule distance, far below one unit


@dataclass(frozen=True, eq=False)
class Scene:
    """What a score may look at: how the tokens lie, `q`, `k` [B, S, H, D], the scale, a bias on the keys."""

    tiling: Tiling
    cut: Cut
    q: torch.Tensor
    k: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None


def score(scene: Scene, config: Score) -> torch.Tensor:
    """Return the scores that a recipe's score axis names."""
    if isinstance(config, GeometryScore):
        return geometry(scene.tiling, config, scene.q.device)
    if isinstance(config, PooledScore):
        return pooled(scene, config)
    if isinstance(config, SubtileScore):
        return subtiles(scene, config)
    if isinstance(config, AntidiagonalScore):
        return antidiagonal(scene, config)
    if isinstance(config, SampledScore):
        return sampled(scene, config)
    return channels(scene, config) if isinstance(config, ChannelScore) else mass(scene)


# Geometry ----------------------------------------------------------------------------------------------------------
def distance(tiling: Tiling, shape: str, device: torch.device) -> torch.Tensor:
    """Return the rule distance of all grid unit pairs, float32 [units, units], in unit lengths.

    "window": the largest difference over the axes. "cross": the smallest difference over the axes that the grid
    has (same row or column of a picture, same plane of a video); GRAT, Ren et al. 2025.
    """
    uploaded = tiling.on(device)
    position = uploaded.position[uploaded.grid_units]
    delta = (position[:, None] - position[None]).abs()
    if shape == "window":
        return delta.amax(-1)
    axes = [axis for axis, extent in enumerate(tiling.layout.main.shape) if extent > 1] or [2]
    return torch.stack([delta[..., axis] for axis in axes], -1).amin(-1)  # a list as index would wait for the device


def geometry(tiling: Tiling, config: GeometryScore, device: torch.device) -> torch.Tensor:
    """Return minus the rule distance, ties broken by the straight distance, float32 [1, 1, units, units]."""
    uploaded = tiling.on(device)
    position = uploaded.position[uploaded.grid_units]
    straight = (position[:, None] - position[None]).square().sum(-1).sqrt()
    return -(distance(tiling, config.shape, device) + TIE * straight)[None, None]


# Means -------------------------------------------------------------------------------------------------------------
def pooled(scene: Scene, config: PooledScore) -> torch.Tensor:
    """Return the softmax over grid keys of mean query times mean key.

    The draft map of DraftAttention, Shen et al. 2025; also of Jenga, Rectified SpaAttn and PBS-Attn. `weigh` counts a
    key unit by its tokens (Sparse VideoGen 2, Yang et al. 2025). `smooth` and `trust` are SpargeAttention's, Zhang et
    al. 2025: units whose tokens point apart are not judged by their mean. Without `softmax` the bare products (VMoBA,
    Wu et al. 2025).
    """
    q, k = _both_means(scene)
    tokens = grid_weights(scene.cut.k)[..., None, :]
    middle = None
    if config.smooth:
        middle = (k * tokens.mT).sum(2, keepdim=True) / tokens.sum(-1, keepdim=True)
        k = k - middle
    logits = q @ k.mT
    if not config.softmax:
        return logits
    logits = logits * scene.scale
    if config.weigh:
        logits = logits + tokens.log()  # an empty cluster weighs nothing
    if config.trust is None:
        return logits.softmax(-1)
    apart_q = likeness(scene.cut.q, scene.q) < config.trust
    apart_k = likeness(scene.cut.k, scene.k, middle) < config.trust
    share = logits.masked_fill(apart_k[:, :, None], float("-inf")).softmax(-1)
    return share.masked_fill(apart_q[..., None] | apart_k[:, :, None], float("inf"))


def likeness(side: Side, x: torch.Tensor, middle: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean cosine of all pairs of tokens within each grid unit, float32 [B, H, units].

    `middle` float32 [B, H, 1, D] is subtracted from the tokens. The mean of the Gram matrix of unit vectors is the
    squared length of their mean.
    """
    return grid_means(side.without_means(), x, middle, "direction").square().sum(-1)


def grid_means(side: Side, x: torch.Tensor, centre: torch.Tensor | None = None, form: Form = "plain") -> torch.Tensor:
    """Average the tokens of each grid unit, [B, S, H, D] -> float32 [B, H, units, D]; empty units give 0.

    `centre` float32 [B, H, units on a grid|1, D] and `form` as in `unit_means`.
    """
    if side.means is not None:
        return side.means
    if side.grid_slots is not None:
        return unit_means(x, side.grid_slots, side.per * side.block, centre=centre, form=form)
    if centre is not None and centre.shape[2] > 1:  # units of text lie behind those on a grid
        centre = torch.nn.functional.pad(centre, (0, 0, 0, side.units - centre.shape[2]))
    return side.on_grid(unit_means(x, side.slots, side.bounds, centre=centre, form=form), 2)


def grid_means_of_two(
    side: Side, x: torch.Tensor, y: torch.Tensor, whole: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average two tensors of one shape and dtype as `grid_means` does; where all units are alike, in one reading.

    Then they are also rounded to that dtype and filled up with units of mean 0 to a multiple of `whole`.
    """
    if side.means is not None or side.grid_slots is None:
        return grid_means(side, x), grid_means(side, y)
    return unit_means_of_two(x, y, side.grid_slots, side.per * side.block, dtype=x.dtype, whole=whole)


def _both_means(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of queries and of keys, from one reading of the order where both lie alike."""
    q, k = scene.cut.q, scene.cut.k
    if q.grid_slots is None or k.grid_slots is None or q.per * q.block != k.per * k.block:
        return grid_means(q, scene.q), grid_means(k, scene.k)
    return unit_means_of_two(scene.q, scene.k, q.grid_slots, q.per * q.block)


def grid_weights(side: Side) -> torch.Tensor:
    """Return the tokens of each grid unit, float32 [B|1, H|1, units]."""
    return side.grid_weights


# Finer than a unit -------------------------------------------------------------------------------------------------
def subtiles(scene: Scene, config: SubtileScore) -> torch.Tensor:
    """Return the softmax over means of few neighbouring tokens, added up to units.

    DFSAttn (ICML 2026) with 16 tokens along a Hilbert curve. There a ragged last piece is averaged with
    zeros; here a piece counts by its real tokens.
    """
    runs = runs_of(scene.tiling, config.tokens, scene.q.device)
    means_q, means_k = unit_means_of_two(scene.q, scene.k, runs.slots[None, None], runs.length)
    return _summed_softmax(means_q, means_k, runs.tokens, scene.scale, len(scene.cut.q.grid))


def antidiagonal(scene: Scene, config: AntidiagonalScore) -> torch.Tensor:
    """Return the softmax over sums along antidiagonals of small squares, added up to units.

    XAttention, Xu et al. 2025, arXiv 2503.16428: queries in reversed order against keys in order, inside each run of
    `stride` tokens. Where a run is ragged, its mean stands for the missing tokens and it counts by its real ones.
    """
    there, back = (runs_of(scene.tiling, config.stride, scene.q.device, backwards) for backwards in (False, True))
    q, k = (_filled(_laid(runs, x), runs).flatten(-2) for runs, x in ((back, scene.q), (there, scene.k)))
    return _summed_softmax(q, k, there.tokens, scene.scale / config.stride, len(scene.cut.q.grid))


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of `length` slots of the grid units: int32 `slots`, int64 `at` without holes, `hole`s [runs, length, 1].

    `tokens` float32 [runs] are counted; `holes` says whether there is any hole.
    """

    length: int
    slots: torch.Tensor
    at: torch.Tensor
    hole: torch.Tensor
    tokens: torch.Tensor
    holes: bool


@lru_cache(maxsize=64)
def runs_of(tiling: Tiling, length: int, device: torch.device, backwards: bool = False) -> Runs:
    """Cut the grid units into runs of slots, at most a unit long, or each in reversed order; made once a device."""
    length = min(length, tiling.unit)
    slots = torch.from_numpy(tiling.slots.reshape(tiling.units, -1)[tiling.grid].reshape(-1)).to(device)
    if backwards:
        slots = slots.view(-1, length).flip(1).flatten()
    hole = (slots < 0).view(-1, length, 1)
    tokens = (~hole).sum((1, 2)).float()
    return Runs(length, slots, slots.clamp(min=0).long(), hole, tokens, bool((tiling.tokens < tiling.unit).any()))


def _laid(runs: Runs, x: torch.Tensor) -> torch.Tensor:
    """Lay [B, S, H, D] into runs of slots, [B, H, runs, length, D] as operands of a product, 0 in holes."""
    picked = rows.operand(x.transpose(1, 2).index_select(2, runs.at).unflatten(2, (-1, runs.length)))
    return picked.masked_fill(runs.hole, 0) if runs.holes else picked


def _filled(pieces: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Put each run's mean in its holes."""
    if not runs.holes:
        return pieces
    mean = pieces.sum(-2, keepdim=True, dtype=torch.float32) / runs.tokens.clamp(min=1)[:, None, None]
    return torch.where(runs.hole, mean.to(pieces.dtype), pieces)


def _summed_softmax(q: torch.Tensor, k: torch.Tensor, tokens: torch.Tensor, scale: float, units: int) -> torch.Tensor:
    """Softmax the products of runs, a key run counted by its tokens, and average to units; a few units at a time.

    `q`, `k` [B, H, runs, C], `tokens` [runs], as many runs in each of `units`; float32 [B, H, units, units] out.
    """
    b, h, runs, _ = q.shape
    each = runs // units
    weigh, step = tokens.log()[None, None], max(1, BYTES // (4 * b * h * each * runs)) * each
    parts = [unit_shares(rows.product(part, k.mT), None, each, scale, weigh) for part in q.split(step, 2)]
    by_unit = tokens.view(units, each)
    weight = (by_unit / by_unit.sum(-1, keepdim=True)).flatten()
    return (torch.cat(parts, 2) * weight[:, None]).unflatten(2, (units, each)).sum(3)


# From rows ---------------------------------------------------------------------------------------------------------
def sampled(scene: Scene, config: SampledScore) -> torch.Tensor:
    """Return the share of sampled queries' attention that each key unit gets, the same in every row.

    ZipVL, He et al. 2024, arXiv 2410.08584: the fewest columns that hold a share of the probed rows' attention serve
    all rows.
    """
    probes = rows.sample(scene.tiling.layout, config.rows, scene.q.device)
    weight = rows.key_mass(scene.q, scene.k, probes, scene.scale, scene.bias)
    side = scene.cut.k
    total = grid_means(side.without_means(), weight.transpose(1, 2)[..., None])[..., 0] * grid_weights(side)
    return total[:, :, None].expand(-1, -1, len(scene.cut.q.grid), -1)


# Exact -------------------------------------------------------------------------------------------------------------
def mass(scene: Scene) -> torch.Tensor:
    """Return the exact attention of each query unit to each key unit, by full attention over all keys, text included.

    AdaSpa, Xia et al. 2025, arXiv 2502.21079, which finds it in two passes with a cached log-sum-exp.
    """
    tiling, device = scene.tiling, scene.q.device
    asking = runs_of(tiling, tiling.unit, device).slots
    got = block_mass(scene.q, scene.k, asking, tiling.on(device).slots, tiling.unit, scene.scale, scene.bias)
    return scene.cut.k.on_grid(got, 3)


def channels(scene: Scene, config: ChannelScore) -> torch.Tensor:
    """Return the softmax over key units of the largest product of any two tokens, on a part of the channels.

    Double Sparsity, Yang et al. 2024, arXiv 2408.07092: channels ranked by the mean of |q| |k| over tokens, in each
    head; there ranked offline and for single tokens, here at each decision and for units.
    """
    tiling, device = scene.tiling, scene.q.device
    kept = max(round(config.share * scene.q.shape[-1]), 1)
    products = scene.q * scene.k
    wide = torch.promote_types(products.dtype, torch.float32)  # vector_norm narrows nothing
    weight = torch.linalg.vector_norm(products, 1, dim=1, dtype=wide)  # [B, H, D]
    best = weight.topk(kept, dim=-1).indices[:, None]
    q, k = (x.gather(3, best.expand(-1, x.shape[1], -1, -1)) for x in (scene.q, scene.k))
    slots = runs_of(tiling, tiling.unit, device).slots
    return block_max(q, k, slots, slots, tiling.unit, kept**-0.5).softmax(-1)
