"""Outputs scaled and moved unit by unit: see `blend`."""

from .api import blend

__all__ = ["blend"]
