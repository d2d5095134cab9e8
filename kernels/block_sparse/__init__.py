"""Attention over lists of key blocks: see `block_sparse_attention`."""

from .api import Precision, Predicate, automatic, block_sparse_attention, unsupported_reasons

__all__ = ["Precision", "Predicate", "automatic", "block_sparse_attention", "unsupported_reasons"]
