"""The door of the operation: checks, the start and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, takes_triton
from dit_accel.kernels.unit_means.api import triton_reasons  # its update is that operation


def kmeans(
    x: Tensor, clusters: int, iterations: int, start: Tensor | None = None, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the tokens of each batch row and head by Euclidean distance, always with the same result.

    Args:
        x: [B, H, N, D], a floating dtype, any strides.
        clusters: from 1 to N.
        iterations: at least 1; each assigns all tokens to the nearest centroid, then moves the centroids to the means.
        start: [B, H, clusters, D] centroids to start from; None takes evenly spaced tokens. Centroids that are not
            finite are replaced by those tokens too.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        labels int32 [B, H, N]; centroids float32 [B, H, clusters, D], the means of the tokens with that label (an
        empty cluster keeps its centroid); sizes int64 [B, H, clusters]. Nothing is read back from the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or numbers that do not fit; RuntimeError: the named back end cannot run
        this, or a gradient is needed.

    Lloyd 1982, batched on the device as in flash-kmeans (Yang et al. 2025). A token that is not finite falls in some
    cluster, whose centroid is then not finite either. Triton compares half-precision tokens with centroids rounded to
    their dtype, which the reference does not: a token about as far from two centroids may fall to either.
    """
    check(x, clusters, iterations, start)
    if takes_triton(backend, "cluster x {}", triton_reasons, x):
        from .triton import lloyd
    else:
        from .reference import lloyd
    return lloyd(x, first_centroids(x, clusters, start), iterations)


def first_centroids(x: Tensor, clusters: int, start: Tensor | None) -> Tensor:
    """Return the first centroids, float32 [B, H, clusters, D]."""
    n = x.shape[2]
    spaced = x[:, :, (torch.arange(clusters, device=x.device) * n + n // 2) // clusters].float()
    if start is None:
        return spaced
    return torch.where(torch.isfinite(start).all(-1, keepdim=True), start.float(), spaced)


def check(x: Tensor, clusters: int, iterations: int, start: Tensor | None) -> None:
    """Raise what `kmeans` raises where its arguments do not fit."""
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x is {list(x.shape)}; expected a non-empty [B, H, N, D]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}; expected a floating dtype")
    b, h, n, d = x.shape
    if not 1 <= clusters <= n:
        raise ValueError(f"clusters is {clusters}; expected 1 to {n}, the tokens of x {list(x.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")
    if start is not None and (tuple(start.shape) != (b, h, clusters, d) or start.device != x.device):
        raise ValueError(
            f"start is {list(start.shape)} on {start.device}; expected {[b, h, clusters, d]} on {x.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or (start is not None and start.requires_grad)):
        raise RuntimeError(
            f"x {list(x.shape)}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )
