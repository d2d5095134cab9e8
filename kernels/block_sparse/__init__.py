"""Attention over lists of key blocks: see `block_sparse_attention`."""

from .api import Predicate, block_sparse_attention, unsupported_reasons

__all__ = ["Predicate", "block_sparse_attention", "unsupported_reasons"]
