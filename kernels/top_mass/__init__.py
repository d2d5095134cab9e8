"""The best pairs of each row until they hold a share of its score: see `top_mass`."""

from .api import top_mass

__all__ = ["top_mass"]
