"""Attention to one pooled key and value for many tokens: see `pooled_attention`."""

from .api import pooled_attention

__all__ = ["pooled_attention"]
