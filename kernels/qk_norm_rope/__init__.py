"""Norm and rotation of queries and keys in one pass: see `qk_norm_rope`."""

from .api import Norm, Part, qk_norm_rope, unsupported_reasons

__all__ = ["Norm", "Part", "qk_norm_rope", "unsupported_reasons"]
