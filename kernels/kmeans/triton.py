"""Lloyd's iteration in Triton: no map of tokens by clusters in memory, no sum whose order depends on luck."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two
from dit_accel.kernels.unit_means.triton import means, runs_on

__all__ = ["assign", "lloyd", "runs_on"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MOST_BITS = 12  # of a score that may hold a cluster's number
FARTHEST = 3e38  # half the squared length of a centroid that is none


@dataclass(frozen=True)
class Tile:
    """How one program works: tokens by clusters of a tile, warps, depth of the load pipeline."""

    tokens: int
    clusters: int
    warps: int
    stages: int


def choose(padded_dim: int, itemsize: int) -> Tile:
    """The tile for one launch, within 99 KB of shared memory; up to 128 channels the fastest of twelve on an H100."""
    if itemsize == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        return Tile(64, 32, 4, 2) if padded_dim <= 128 else Tile(32, 32, 4, 2)
    return Tile(128, 64, 4, 2) if padded_dim <= 128 else Tile(64, 32, 4, 3)


@triton.jit
def _assign_kernel(
    x_ptr, centroid_ptr, half_ptr, label_ptr, stride_b, stride_h, stride_n, stride_d,
    tokens, clusters, rows, heads, tiles,
    D: tl.constexpr, D_PAD: tl.constexpr, TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """argmax over c of x . c - |c|^2 / 2, the nearest centroid, for TOKENS tokens of one head.

    With BITS a score's last bits are its cluster's number, so that one maximum keeps both.
    """
    tile, row = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)  # a head's centroids stay in L2
    token = tile * TOKENS + tl.arange(0, TOKENS)
    d, column = tl.arange(0, D_PAD), tl.arange(0, CLUSTERS)
    x_at = x_ptr + (row // heads) * stride_b + (row % heads) * stride_h
    x_at = x_at + token.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    x = tl.load(x_at, mask=(token < tokens)[:, None] & (d < D)[None, :], other=0.0)  # [TOKENS, D_PAD]
    if INTERPRETED:  # its matrix product takes bf16 for integers
        x = x.to(tl.float32)
    centroid_ptr += row * rows * D_PAD
    half_ptr += row * rows
    # one running maximum per column of the tile: the columns are compared once, at the end
    best = tl.full([TOKENS, CLUSTERS], float("-inf"), tl.float32)
    best_at = tl.zeros([TOKENS, CLUSTERS], tl.int32)
    for first in tl.range(0, rows, CLUSTERS, num_stages=STAGES):
        centroid = tl.load(centroid_ptr + (first + column)[:, None] * D_PAD + d[None, :])  # [CLUSTERS, D_PAD]
        if INTERPRETED:
            centroid = centroid.to(tl.float32)
        score = tl.dot(x, centroid.T, input_precision=PRECISION) - tl.load(half_ptr + first + column)[None, :]
        if BITS:
            coarse = score.to(tl.int32, bitcast=True) & (-1 << BITS)
            best = tl.maximum(best, (coarse | (first + column)[None, :]).to(tl.float32, bitcast=True))
        else:
            better = score > best  # never for NaN, and of equal ones the first stays
            best = tl.where(better, score, best)
            best_at = tl.where(better, first, best_at)
    top = tl.max(best, 1)
    if BITS:
        label = top.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    else:
        label = tl.min(tl.where(best == top[:, None], best_at + column[None, :], rows), 1)
    label = tl.where(label < clusters, label, 0)  # of a token that is not finite, or whose scores are not
    tl.store(label_ptr + row * tokens + token, label, mask=token < tokens)


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run `iterations` of assignment and update; shapes as in `kmeans`."""
    labels, sizes = assign(x, centroids), centroids
    for done in range(iterations):
        if done:
            labels = assign(x, centroids)
        centroids, sizes = update(x, labels, centroids)
    return labels, centroids, sizes


def assign(x: Tensor, centroids: Tensor, tile: Tile | None = None, *, lengths: bool = True) -> Tensor:
    """Give each token its nearest centroid, int32 [B, H, N]; `tile` overrides the choice (for benchmarks).

    The tokens are compared with the centroids rounded to their dtype, summed in fp32. In fp32 the first of equal ones
    is taken. In fp16 and bf16 scores lose as many bits as a cluster's number has (`MOST_BITS` at most) before they are
    compared, and which of equal ones is taken is not said, but always the same.
    Without `lengths` the centroid of largest product with the token is taken instead of the nearest.
    """
    labels = torch.empty(x.shape[:3], dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        grid, args, constants = launch(x, centroids, labels, tile, lengths)
        _assign_kernel[grid](*args, **constants)
    return labels


def launch(
    x: Tensor, centroids: Tensor, labels: Tensor, tile: Tile | None = None, lengths: bool = True
) -> tuple[tuple[int], tuple, dict[str, Any]]:
    """Grid, positional arguments and compile-time constants of the assignment for one call."""
    b, h, n, d = x.shape
    padded = power_of_two(d, 16)
    tile = tile or choose(padded, x.element_size())
    # whole tiles of centroids, so that the loop loads without masks; one that is none is very long
    clusters = centroids.shape[2]
    rows = -(-clusters // tile.clusters) * tile.clusters
    packed = torch.zeros(b, h, rows, padded, dtype=x.dtype, device=x.device)
    packed[:, :, :clusters, :d] = centroids
    half = packed.float().square().sum(-1) / 2 * lengths
    half[:, :, clusters:] = FARTHEST
    tiles, bits = -(-n // tile.tokens), (rows - 1).bit_length()
    args = (x, packed, half, labels, *x.stride(), n, clusters, rows, h, tiles)
    constants = {
        "D": d,
        "D_PAD": padded,
        "TOKENS": tile.tokens,
        "CLUSTERS": tile.clusters,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "BITS": 0 if x.dtype == torch.float32 or bits > MOST_BITS else bits,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (tiles * b * h,), args, constants


def update(x: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Move each centroid to the mean of its tokens; return the centroids and the sizes, int64 [B, H, clusters].

    One stable sort brings the tokens of a cluster side by side, so each sum has one order, and no atomics.
    """
    b, h, clusters, _ = centroids.shape
    n = labels.shape[2]
    rows = torch.arange(b * h, dtype=torch.int32, device=x.device)[:, None]
    keys, at = (labels.view(b * h, n) + rows * clusters).flatten().sort(stable=True)
    tokens = (at % n).int().view(b, h, n)
    edges = torch.searchsorted(keys, torch.arange(b * h * clusters + 1, dtype=torch.int32, device=x.device))
    bounds = (edges.unfold(0, clusters + 1, clusters) - rows * n).view(b, h, clusters + 1)
    sizes = bounds.diff(dim=-1)
    return torch.where(sizes[..., None] > 0, means(x.transpose(1, 2), tokens, bounds), centroids), sizes
