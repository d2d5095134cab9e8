"""Exact merge of attention branches: see `merge_attention`."""

from .api import merge_attention

__all__ = ["merge_attention"]
