"""The door of the operation: checks and the start."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import lloyd


def kmeans(x: Tensor, clusters: int, iterations: int, start: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster the tokens of each batch row and head by Euclidean distance, always with the same result.

    Args:
        x: [B, H, N, D], a floating dtype, any strides.
        clusters: from 1 to N.
        iterations: at least 1; each assigns all tokens to the nearest centroid, then moves the centroids to the means.
        start: [B, H, clusters, D] centroids to start from; None takes evenly spaced tokens. Centroids that are not
            finite are replaced by those tokens too.

    Returns:
        labels int32 [B, H, N]; centroids float32 [B, H, clusters, D], the means of the tokens with that label (an
        empty cluster keeps its centroid); sizes int64 [B, H, clusters]. Nothing is read back from the device.

    Raises:
        ValueError, TypeError: shapes, dtypes or numbers that do not fit.

    Lloyd 1982, batched on the device as in flash-kmeans (Yang et al. 2025). A token that is not finite falls in some
    cluster, whose centroid is then not finite either.
    """
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x is {list(x.shape)}; expected a non-empty [B, H, N, D]")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}; expected a floating dtype")
    b, h, n, d = x.shape
    if not 1 <= clusters <= n:
        raise ValueError(f"clusters is {clusters}; expected 1 to {n}, the tokens of x {list(x.shape)}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; expected at least 1")
    spaced = x[:, :, (torch.arange(clusters, device=x.device) * n + n // 2) // clusters].float()
    if start is None:
        return lloyd(x, spaced, iterations)
    if tuple(start.shape) != (b, h, clusters, d) or start.device != x.device:
        raise ValueError(
            f"start is {list(start.shape)} on {start.device}; expected {[b, h, clusters, d]} on {x.device}"
        )
    usable = torch.isfinite(start).all(-1, keepdim=True)
    return lloyd(x, torch.where(usable, start.float(), spaced), iterations)
