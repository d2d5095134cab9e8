"""Means of the tokens of each unit, read through an order: see `unit_means`."""

from .api import Form, unit_means, unit_means_of_two

__all__ = ["Form", "unit_means", "unit_means_of_two"]
