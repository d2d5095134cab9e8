"""Means of the tokens of each unit, read through an order: see `unit_means`."""

from .api import unit_means, unit_means_of_two

__all__ = ["unit_means", "unit_means_of_two"]
