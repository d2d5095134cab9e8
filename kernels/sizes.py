"""Sizes of launches in plain integers: Triton's own helpers go through a wrapper that costs microseconds a call."""

from __future__ import annotations

from torch import Tensor


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `n` and at least `least`."""
    return max(1 << (n - 1).bit_length(), least)


def common(axis: int, *tensors: Tensor) -> int:
    """Return the size that tensors, of size 1 or one other size on an axis, broadcast to."""
    sizes = [tensor.shape[axis] for tensor in tensors]
    return next((size for size in sizes if size != 1), 1)
