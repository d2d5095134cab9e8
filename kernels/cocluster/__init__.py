"""Batched co-clustering of queries and keys: see `cocluster`."""

from .api import cocluster

__all__ = ["cocluster"]
