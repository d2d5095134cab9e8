"""The largest product of any two tokens of two units: see `block_max`."""

from .api import block_max

__all__ = ["block_max"]
