"""How much attention each key unit gets from each query unit: see `block_mass`."""

from .api import block_mass, block_mass_and_lse

__all__ = ["block_mass", "block_mass_and_lse"]
