"""k-means in plain torch: the definition of right, and what runs without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 256 << 20  # of distances held at once


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run `iterations` of assignment and update; shapes as in `kmeans`. Arithmetic is fp32.

    Sums are matrix products with a one-hot map, a few tokens at a time, so that they come out the same every time
    and no map over all tokens and clusters is held.
    """
    labels = torch.empty(x.shape[:3], dtype=torch.int32, device=x.device)
    sizes = torch.zeros(centroids.shape[:3], dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        labels, centroids, sizes = move(x, centroids, centroids, centroids.square().sum(-1))
    return labels, centroids, sizes


def move(x: Tensor, centroids: Tensor, directions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each token the cluster of least length - 2 x . direction; return labels, the new centroids and the sizes.

    With the centroids as directions and their squared lengths that is the nearest centroid: the token's own length is
    the same for all.
    """
    b, h, clusters, _ = centroids.shape
    ids = torch.arange(clusters, device=x.device)
    sums, sizes, labels = torch.zeros_like(centroids), torch.zeros_like(centroids[..., 0]), []
    for part in x.split(max(1, BYTES // (4 * b * h * clusters)), dim=2):
        tokens = part.float()
        distance = lengths[:, :, None] - 2 * tokens @ directions.mT
        label = distance.nan_to_num(nan=float("inf")).argmin(-1)
        member = (label[..., None] == ids).float()
        sums += member.mT @ tokens
        sizes += member.sum(2)
        labels.append(label.to(torch.int32))
    moved = torch.where(sizes[..., None] > 0, sums / sizes[..., None].clamp(min=1), centroids)
    return torch.cat(labels, 2), moved, sizes.long()
