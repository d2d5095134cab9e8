"""Means of the tokens of each unit, read through an order: see `unit_means`."""

from .api import unit_means

__all__ = ["unit_means"]
