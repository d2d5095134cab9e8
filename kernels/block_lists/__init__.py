"""From chosen unit pairs to lists of key blocks: see `block_lists`."""

from .api import BlockLists, block_lists

__all__ = ["BlockLists", "block_lists"]
