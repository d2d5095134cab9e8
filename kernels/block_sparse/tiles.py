"""Which tile a launch uses: a committed table of measured choices, no tuning at run time (but see `tuned.py`)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

Kind = Literal["plain", "holes", "predicate", "bias"]


@dataclass(frozen=True)
class Tile:
    """How one program works.

    `q` and `k` are the rows of a tile (powers of two dividing the list's blocks), `stages` the depth of the
    load pipeline. `tma` loads key tiles through tensor descriptors, and `pack` copies keys and values into
    slot order first when there is a key order.
    """

    q: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    pack: bool = False


# Half-precision tiles by (kind of call, padded head dim, query rows, key rows), measured on an H100 with
# Triton 3.6. A list whose key blocks are larger than the tile takes the last entry that fits.
HOPPER: dict[tuple[Kind, int, int, int], Tile] = {
    ("plain", 64, 64, 64): Tile(64, 64, 4, 4, tma=True, pack=True),
    ("plain", 64, 128, 64): Tile(128, 64, 4, 3, tma=True, pack=True),
    ("plain", 64, 128, 128): Tile(128, 64, 4, 4, tma=True, pack=True),
    ("plain", 128, 64, 64): Tile(64, 64, 4, 3, tma=True, pack=True),
    ("plain", 128, 128, 64): Tile(128, 64, 4, 2, tma=True, pack=True),
    ("plain", 256, 128, 64): Tile(128, 64, 8, 2, tma=True, pack=True),
    ("holes", 64, 64, 64): Tile(64, 64, 4, 3, tma=True, pack=True),
    ("holes", 64, 128, 64): Tile(128, 64, 4, 3, tma=True, pack=True),
    ("holes", 128, 64, 64): Tile(64, 64, 4, 3, tma=True, pack=True),
    ("holes", 128, 128, 64): Tile(128, 64, 4, 3, tma=True, pack=True),
    ("holes", 128, 128, 128): Tile(128, 128, 8, 2, tma=True, pack=True),
    ("predicate", 64, 64, 64): Tile(64, 64, 4, 2, tma=True, pack=True),
    # four warps hold too many coordinates of a 128 x 64 tile and spill
    ("predicate", 64, 128, 64): Tile(128, 64, 8, 3, tma=True, pack=True),
    ("predicate", 128, 64, 64): Tile(64, 64, 4, 2, tma=True, pack=True),
    ("predicate", 128, 128, 64): Tile(128, 64, 8, 2, tma=True, pack=True),
    ("bias", 64, 64, 64): Tile(64, 64, 4, 2),
    ("bias", 64, 128, 128): Tile(128, 128, 4, 2),
    ("bias", 128, 64, 64): Tile(64, 64, 4, 2),
    ("bias", 128, 128, 64): Tile(128, 32, 4, 2),
}


def power_of_two_part(block: int) -> int:
    """The largest power of two that divides `block`."""
    return block & -block


def choose(capability: tuple[int, int], padded_dim: int, itemsize: int, block_q: int, block_k: int, kind: Kind) -> Tile:
    """The tile for one launch; `kind` names what costs most in it."""
    q, k = power_of_two_part(block_q), power_of_two_part(block_k)
    if itemsize == 4:  # products without tensor cores: more than 2048 steps a thread compile for minutes
        wide = padded_dim > 64  # four warps then spill
        return Tile(min(q, 32 if wide else 64), min(k, 64 if padded_dim <= 128 else 16), 8 if wide else 4, 2)
    if capability not in ((8, 0), (9, 0), (10, 0)):  # 99 KB of shared memory
        return Tile(min(q, 64), min(k, 64 if padded_dim <= 128 else 32), 4, 2)
    if capability >= (9, 0):
        for known, rows in itertools.product((kind, "plain") if kind != "bias" else ("bias",), (128, 64)):
            tile = HOPPER.get((known, padded_dim, q, rows))
            if tile is not None and rows <= k:
                return tile
    if padded_dim == 256:
        return Tile(q, min(k, 32), 8, 2)
    if capability < (9, 0):  # without wgmma, four warps have no registers left for masks and spill kilobytes
        return Tile(q, min(k, 64), 4 if kind == "plain" or q < 128 else 8, 2)
    return Tile(q, min(k, 64), 4, 3)
