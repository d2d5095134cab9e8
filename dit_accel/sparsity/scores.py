"""Axis 2, score: how much a pair (query unit, key unit) is worth. Higher is better.

Scores are float32 [B|1, H|1, query units on a grid, key units on a grid]. A NaN or Inf in a unit makes its scores
non-finite, which selectors read as "compute it". Text is kept by rule and has no scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import AntidiagonalScore, ChannelScore, GeometryScore, PooledScore, SampledScore, Score, SubtileScore
from ..kernels.unit_means import unit_means
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
    q, k = grid_means(scene.cut.q, scene.q), grid_means(scene.cut.k, scene.k)
    tokens = grid_weights(scene.cut.k)[..., None, :]
    middle = torch.zeros_like(k[:, :, :1])
    if config.smooth:
        middle = (k * tokens.mT).sum(2, keepdim=True) / tokens.sum(-1, keepdim=True)
    logits = q @ (k - middle).mT
    if not config.softmax:
        return logits
    logits = logits * scene.scale
    if config.weigh:
        logits = logits + tokens.log()  # an empty cluster weighs nothing
    if config.trust is None:
        return logits.softmax(-1)
    keys = scene.k.float() - middle.transpose(1, 2)
    apart_q = likeness(scene.cut.q, scene.q.float()) < config.trust
    apart_k = likeness(scene.cut.k, keys) < config.trust
    share = logits.masked_fill(apart_k[:, :, None], float("-inf")).softmax(-1)
    return share.masked_fill(apart_q[..., None] | apart_k[:, :, None], float("inf"))


def likeness(side: Side, x: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of all pairs of tokens within each grid unit, float32 [B, H, units].

    The mean of the Gram matrix of unit vectors is the squared length of their mean.
    """
    return grid_means(side, torch.nn.functional.normalize(x, dim=-1)).square().sum(-1)


def grid_means(side: Side, x: torch.Tensor) -> torch.Tensor:
    """Average the tokens of each grid unit, [B, S, H, D] -> float32 [B, H, units, D]; empty units give 0."""
    if side.means is not None:
        return side.means
    return unit_means(x, side.slots, _bounds(side))[:, :, side.grid]


def grid_weights(side: Side) -> torch.Tensor:
    """Return the tokens of each grid unit, float32 [B|1, H|1, units]."""
    return side.weights[..., side.grid]


def _bounds(side: Side) -> int | torch.Tensor:
    """Return the slots of every unit, or the first of each and the end, int64 [B|1, H|1, units + 1]."""
    if side.per:
        return side.per * side.block
    units = torch.arange(side.units + 1, device=side.owner.device).expand(*side.owner.shape[:2], -1)
    return torch.searchsorted(side.owner.contiguous(), units.contiguous()) * side.block


def in_slots(side: Side, x: torch.Tensor) -> torch.Tensor:
    """Lay the tokens of [B, S, H, D] into slots, [B, H, slots, D]; a hole repeats the first token."""
    at = side.slots.clamp(min=0).long()
    if side.shared:
        return x[:, at[0, 0]].transpose(1, 2)
    b, _, h, d = x.shape
    return x.transpose(1, 2).gather(2, at.expand(b, h, -1)[..., None].expand(-1, -1, -1, d))


# Finer than a unit -------------------------------------------------------------------------------------------------
def subtiles(scene: Scene, config: SubtileScore) -> torch.Tensor:
    """Return the softmax over means of few neighbouring tokens, added up to units.

    DFSAttn (ICML 2026) with 16 tokens along a Hilbert curve. There a ragged last piece is averaged with
    zeros; here a piece counts by its real tokens.
    """
    q, q_tokens = pieces(scene.tiling, scene.q, config.tokens)
    k, k_tokens = pieces(scene.tiling, scene.k, config.tokens)
    means_q = q.sum(-2) / q_tokens.clamp(min=1)[..., None]
    means_k = k.sum(-2) / k_tokens.clamp(min=1)[..., None]
    return _summed_softmax(means_q, means_k, q_tokens, k_tokens, scene.scale, len(scene.cut.q.grid))


def antidiagonal(scene: Scene, config: AntidiagonalScore) -> torch.Tensor:
    """Return the softmax over sums along antidiagonals of small squares, added up to units.

    XAttention, Xu et al. 2025, arXiv 2503.16428: queries in reversed order against keys in order, inside each run of
    `stride` tokens. Where a run is ragged, its mean stands for the missing tokens and it counts by its real ones.
    """
    stride = config.stride
    q, q_tokens = pieces(scene.tiling, scene.q, stride)
    k, k_tokens = pieces(scene.tiling, scene.k, stride)
    flat_q, flat_k = _filled(q, q_tokens).flip(-2).flatten(-2), _filled(k, k_tokens).flatten(-2)
    return _summed_softmax(flat_q, flat_k, q_tokens, k_tokens, scene.scale / stride, len(scene.cut.q.grid))


def pieces(tiling: Tiling, x: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the grid units into runs of slots, float32 [B, H, runs, length, D] (0 in holes), and count their tokens."""
    uploaded = tiling.on(x.device)
    length = min(length, tiling.unit)
    slots = uploaded.slots.view(tiling.units, tiling.unit)[uploaded.grid_units].view(-1, length)
    picked = x[:, slots.clamp(min=0).long().flatten()].transpose(1, 2).unflatten(2, (-1, length)).float()
    return picked.masked_fill((slots < 0)[..., None], 0), (slots >= 0).sum(-1).float()


def _filled(pieces: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Put each run's mean in its holes (holes lie at the end of a run)."""
    mean = pieces.sum(-2, keepdim=True) / tokens.clamp(min=1)[:, None, None]
    hole = torch.arange(pieces.shape[-2], device=pieces.device) >= tokens[:, None]
    return torch.where(hole[..., None], mean, pieces)


def _summed_softmax(
    q: torch.Tensor, k: torch.Tensor, q_tokens: torch.Tensor, k_tokens: torch.Tensor, scale: float, units: int
) -> torch.Tensor:
    """Softmax the products of runs, a key run counted by its tokens, and average to units; a few units at a time.

    `q`, `k` [B, H, runs, C], `tokens` [runs], as many runs in each of `units`; float32 [B, H, units, units] out.
    """
    b, h, runs, _ = q.shape
    each = runs // units
    weigh = k_tokens.log()
    out = []
    for first in range(0, units, max(1, BYTES // (4 * b * h * each * runs))):
        rows = slice(first * each, (first + max(1, BYTES // (4 * b * h * each * runs))) * each)
        share = (q[:, :, rows] @ k.mT * scale + weigh).softmax(-1)
        share = share.unflatten(-1, (units, each)).sum(-1) * q_tokens[rows][:, None]
        share = share.unflatten(2, (-1, each)).sum(3)
        out.append(share / q_tokens[rows].view(-1, each).sum(-1)[:, None])
    return torch.cat(out, 2)


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
    uploaded, length = scene.tiling.on(scene.q.device), scene.k.shape[1]
    unit = scene.cut.k.unit_of_token(length)[0, 0]
    gather = torch.zeros(length, scene.tiling.units, device=unit.device).scatter_(1, unit[:, None], 1.0)
    gather = gather[:, uploaded.grid_units]

    def part(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if scene.bias is not None:
            logits = logits + scene.bias[:, :, None, None]
        share = logits.softmax(-1) @ gather
        return (share * real[..., None]).sum(3) / real.sum(-1)[:, None]

    return torch.cat([part(*each) for each in products(scene, scene.q, scene.k, scene.scale)], 2)


def channels(scene: Scene, config: ChannelScore) -> torch.Tensor:
    """Return the softmax over key units of the largest product of any two tokens, on a part of the channels.

    Double Sparsity, Yang et al. 2024, arXiv 2408.07092: channels ranked by the mean of |q| |k| over tokens, in each
    head; there ranked offline and for single tokens, here at each decision and for units.
    """
    uploaded, tiling = scene.tiling.on(scene.q.device), scene.tiling
    kept = max(round(config.share * scene.q.shape[-1]), 1)
    weight = (scene.q.float() * scene.k.float()).abs().mean(1)  # [B, H, D]
    best = weight.topk(kept, dim=-1).indices[:, None]
    q, k = (x.gather(3, best.expand(-1, x.shape[1], -1, -1)) for x in (scene.q, scene.k))
    slots = uploaded.slots.view(tiling.units, tiling.unit)[uploaded.grid_units].long()
    hole = slots < 0

    def part(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        logits = logits.masked_fill(real[..., None] == 0, float("-inf")).amax(3)
        return logits[..., slots.clamp(min=0)].masked_fill(hole, float("-inf")).amax(-1).softmax(-1)

    return torch.cat([part(*each) for each in products(scene, q, k, kept**-0.5)], 2)


def products(
    scene: Scene, q: torch.Tensor, k: torch.Tensor, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the logits of a few query units to all keys, float32 [B, H, units, unit, keys], and which slots are real.

    `q`, `k` [B, S, H, C]. Memory stays below `BYTES` a part, so no map over token pairs is ever held.
    """
    uploaded, tiling = scene.tiling.on(q.device), scene.tiling
    slots = uploaded.slots.view(tiling.units, tiling.unit)[uploaded.grid_units]
    b, s, h, _ = k.shape
    keys = k.permute(0, 2, 3, 1).float()
    for part in slots.split(max(1, BYTES // (4 * b * h * s * tiling.unit))):
        queries = q[:, part.clamp(min=0).long().flatten()].transpose(1, 2).float()
        yield (queries @ keys * scale).unflatten(2, part.shape), (part >= 0).float()
