"""Half a round of co-clustering by the assignment and the update of `kmeans` in Triton."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.kmeans.triton import assign, update


def move(x: Tensor, centroids: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each token the cluster of largest product; return labels, the new centroids and the sizes."""
    labels = assign(x, directions, lengths=False)
    return labels, *update(x, labels, centroids)
