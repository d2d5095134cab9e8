"""The softmax of rows of logits, added up by unit or by key: see `unit_shares` and `key_shares`."""

from .api import key_shares, unit_shares

__all__ = ["key_shares", "unit_shares"]
