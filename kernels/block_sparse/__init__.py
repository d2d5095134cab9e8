"""Attention over lists of key blocks: see `block_sparse_attention`."""

from .api import Precision, Predicate, automatic, block_sparse_attention, unsupported_reasons
from .fine import COARSE_QUERIES, FINE_KEYS, cluster_blocks

__all__ = [
    "COARSE_QUERIES",
    "FINE_KEYS",
    "Precision",
    "Predicate",
    "automatic",
    "block_sparse_attention",
    "cluster_blocks",
    "unsupported_reasons",
]
