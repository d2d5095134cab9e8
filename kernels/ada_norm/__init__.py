"""Layer norm, scale and shift in one pass: see `ada_norm`."""

from .api import ada_norm, unsupported_reasons

__all__ = ["ada_norm", "unsupported_reasons"]
