"""The door of the operation: checks, the start and choice of the back end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, takes_triton
from dit_accel.kernels.kmeans.api import check, first_centroids  # each half step is that operation's, another distance
from dit_accel.kernels.unit_means.api import unsupported_reasons

Clusters = tuple[Tensor, Tensor, Tensor]


def cocluster(
    q: Tensor,
    k: Tensor,
    clusters: tuple[int, int],
    iterations: int,
    start: tuple[Tensor, Tensor] | None = None,
    *,
    backend: Backend | None = None,
) -> tuple[Clusters, Clusters]:
    """Cluster queries and keys together: tokens are alike when their products with the other side's centroids are.

    Args:
        q, k: [B, H, N, D] and [B, H, M, D], a floating dtype, any strides.
        clusters: of queries, from 1 to N, and of keys, from 1 to M.
        iterations: at least 1; each assigns and moves the keys, then the queries.
        start: [B, H, clusters, D] centroids of either side to start from; None takes evenly spaced tokens. Centroids
            that are not finite are replaced by those tokens too.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        For the queries and for the keys: labels int32 [B, H, N]; centroids float32 [B, H, clusters, D], the means of
        the tokens with that label (an empty cluster keeps its centroid); sizes int64 [B, H, clusters].

    Raises:
        ValueError, TypeError: shapes, dtypes or numbers that do not fit; RuntimeError: the named back end cannot run
        this, or a gradient is needed.

    SVOO, arXiv 2603.18636. A token's profile is the unit vector along its products with the other side's centroids; it
    falls to the cluster whose centroid's profile is nearest. Among unit vectors that is the largest product, and the
    token's own length changes no order: so each cluster is one direction of D channels, the combination of the other
    side's centroids by its profile, and no map of tokens by centroids is made.
    """
    first = []
    for x, count, begin in zip((q, k), clusters, start or (None, None), strict=True):
        check(x, count, iterations, begin)
        first.append(first_centroids(x, count, begin))
    if takes_triton(backend, "cluster q {}", _triton_reasons, q, k):
        from .triton import move
    else:
        from .reference import move
    queries, keys = _round(move, q, k, first[0], first[1])
    for _ in range(iterations - 1):
        queries, keys = _round(move, q, k, queries[1], keys[1])
    return queries, keys


def _triton_reasons(q: Tensor, k: Tensor) -> list[str]:
    return unsupported_reasons("triton", q) + unsupported_reasons("triton", k)


def _round(
    move: Callable[..., Clusters], q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor
) -> tuple[Clusters, Clusters]:
    """Move the keys by the centroids of the queries, then the queries by the new ones of the keys."""
    keys = move(k, of_k, directions(of_k, of_q))
    return move(q, of_q, directions(of_q, keys[1])), keys


def directions(own: Tensor, other: Tensor) -> Tensor:
    """Return what a token's product with tells how near its profile is to each cluster's, [B, H, clusters, D]."""
    return torch.nn.functional.normalize(own @ other.mT, dim=-1) @ other
