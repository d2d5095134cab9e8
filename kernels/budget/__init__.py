"""The best pairs of a score map that fit into a budget: see `fill_rows` and `fill_heads`."""

from .api import fill_heads, fill_rows

__all__ = ["fill_heads", "fill_rows"]
