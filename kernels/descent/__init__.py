"""The best product met on the way down a unit of keys: see `descend`."""

from .api import descend

__all__ = ["descend"]
