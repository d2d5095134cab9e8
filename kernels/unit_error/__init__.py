"""What it costs the output to let the means of a unit stand for its keys and values: see `unit_error`."""

from .api import unit_error

__all__ = ["unit_error"]
