"""Batched k-means: see `kmeans`."""

from .api import kmeans

__all__ = ["kmeans"]
