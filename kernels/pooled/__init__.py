"""Attention to one pooled key and value for many tokens: see `pooled_attention`."""

from .api import WHOLE, pooled_attention

__all__ = ["WHOLE", "pooled_attention"]
