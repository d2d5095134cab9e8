"""Space-filling curves over a grid of (frames, height, width) tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]
Shape = tuple[int, int, int]
Vector = tuple[int, int, int]


def hilbert(grid: Shape) -> Array:
    """Return the tokens along the Hilbert curve of the smallest enclosing power-of-two cube (square for pictures).

    Cells outside the grid are left out, so any grid works; Skilling, "Programming the Hilbert curve" (2004).
    """
    coords = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1).astype(np.int64)
    axes = [axis for axis in range(3) if grid[axis] > 1] or [2]
    bits = max(1, int(max(grid) - 1).bit_length())
    return np.argsort(_hilbert_key(coords[:, axes], bits), kind="stable").astype(np.int64)


def _hilbert_key(points: Array, bits: int) -> Array:
    """Return each point's position along the Hilbert curve of 2**bits cells a side."""
    x = points.T.copy()
    n = len(x)
    q = 1 << (bits - 1)
    while q > 1:  # undo the rotations and reflections, from the coarsest level down
        low = q - 1
        for i in range(n):
            flip = (x[i] & q) != 0
            swap = np.where(flip, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(flip, x[0] ^ low, x[0] ^ swap)
            x[i] ^= swap
        q >>= 1
    for i in range(1, n):  # Gray code
        x[i] ^= x[i - 1]
    flip = np.zeros_like(x[0])
    q = 1 << (bits - 1)
    while q > 1:
        flip = np.where((x[n - 1] & q) != 0, flip ^ (q - 1), flip)
        q >>= 1
    x ^= flip
    key = np.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for i in range(n):
            key = (key << 1) | ((x[i] >> bit) & 1)
    return key


def gilbert(grid: Shape) -> Array:
    """Return the tokens along a generalised Hilbert curve, which fills any box without leaving it.

    Černý, "gilbert: space-filling curve for rectangular domains of arbitrary size" (2018); Jenga, Zhang et al. 2025
    and Rectified SpaAttn order video tokens by it. Steps go to neighbours in pictures and where all sides are even; odd
    sides of a video cost some jumps of two or three cells.
    """
    axes = sorted(range(3), key=lambda axis: -grid[axis])  # the longest axis leads
    first, second, third = (_along(axis, grid[axis]) for axis in axes)
    cells = np.concatenate(list(_walk((0, 0, 0), (first, second, third))))
    return np.ravel_multi_index((cells[:, 0], cells[:, 1], cells[:, 2]), grid).astype(np.int64)


def _along(axis: int, length: int) -> Vector:
    return (length * (axis == 0), length * (axis == 1), length * (axis == 2))


def _add(*vectors: Vector) -> Vector:
    return (sum(v[0] for v in vectors), sum(v[1] for v in vectors), sum(v[2] for v in vectors))


def _neg(v: Vector) -> Vector:
    return (-v[0], -v[1], -v[2])


def _unit(v: Vector) -> Vector:
    return ((v[0] > 0) - (v[0] < 0), (v[1] > 0) - (v[1] < 0), (v[2] > 0) - (v[2] < 0))


def _half(v: Vector) -> Vector:
    """Halve a side, to an even length where it is longer than two."""
    half = (v[0] // 2, v[1] // 2, v[2] // 2)
    return _add(half, _unit(v)) if sum(half) % 2 and abs(sum(v)) > 2 else half


def _walk(at: Vector, sides: tuple[Vector, Vector, Vector]) -> Iterator[Array]:
    """Yield straight lines of cells through the box that `sides` span from `at`, entered and left along side one."""
    a, b, c = sides
    w, h, d = (abs(sum(side)) for side in sides)
    for side, others in ((a, h * d), (b, w * d), (c, w * h)):
        if others == 1:
            yield np.array(at) + np.arange(abs(sum(side)))[:, None] * np.array(_unit(side))
            return
    a2, b2, c2 = _half(a), _half(b), _half(c)
    rest_a, rest_b, rest_c = _add(a, _neg(a2)), _add(b, _neg(b2)), _add(c, _neg(c2))
    end_a, end_c = _add(a, _neg(_unit(a))), _add(c, _neg(_unit(c)))
    end_b2, end_c2 = _add(b2, _neg(_unit(b))), _add(c2, _neg(_unit(c)))
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes one after the other
        yield from _walk(at, (a2, b, c))
        yield from _walk(_add(at, a2), (rest_a, b, c))
    elif 3 * h > 4 * d:  # flat in the third axis
        yield from _walk(at, (b2, c, a2))
        yield from _walk(_add(at, b2), (a, rest_b, c))
        yield from _walk(_add(at, end_a, end_b2), (_neg(b2), c, _neg(rest_a)))
    elif 3 * d > 4 * h:  # flat in the second axis
        yield from _walk(at, (c2, a2, b))
        yield from _walk(_add(at, c2), (a, b, rest_c))
        yield from _walk(_add(at, end_a, end_c2), (_neg(c2), _neg(rest_a), b))
    else:
        yield from _walk(at, (b2, c2, a2))
        yield from _walk(_add(at, b2), (c, a2, rest_b))
        yield from _walk(_add(at, end_b2, end_c), (a, _neg(b2), _neg(rest_c)))
        yield from _walk(_add(at, end_a, b2, end_c), (_neg(c), _neg(rest_a), rest_b))
        yield from _walk(_add(at, end_a, end_b2), (_neg(b2), c2, _neg(rest_a)))
