"""Cut a token layout into units and kernel blocks, once per layout; holes pad what is ragged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ..config import AxesOrder, GilbertOrder, HilbertOrder, StaticOrder, TileOrder
from ..layout import Grid, TokenLayout
from . import orders
from .cut import Cut, Side

BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True, eq=False)
class Tiling:
    """Units of one layout under one order; all units have `unit` slots, a slot holds a token or a hole (-1).

    Keys are chosen in `key_parts` equal parts of a unit, each of them a unit of the keys' side of the cut.
    `slots` [units * unit] token indices; `tokens` [units] real tokens; `grid` [units] whether the unit lies on a
    grid (else text); `words` [units] whether it holds text that is ranked like a grid's tokens; `position` [units, 3]
    in unit lengths; `first_frame` and `sink_rank` [units] for keeps.
    """

    layout: TokenLayout
    unit: int
    block_q: int
    block_k: int
    slots: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int64]
    grid: npt.NDArray[np.bool_]
    words: npt.NDArray[np.bool_]
    position: npt.NDArray[np.float64]
    first_frame: npt.NDArray[np.bool_]
    sink_rank: npt.NDArray[np.int64]
    side: orders.Shape | None = None  # of a tile, None where units are no tiles of a lattice
    key_parts: int = 1

    @property
    def units(self) -> int:
        return len(self.tokens)

    @cached_property
    def identity(self) -> bool:
        """Whether slots are the tokens as they lie, so that no order has to be applied."""
        real = self.slots[: self.layout.length]
        return bool((real == np.arange(len(real))).all() and (self.slots[len(real) :] == -1).all())

    def tokens_per_block(self, block: int) -> npt.NDArray[np.int64]:
        """Real tokens in each kernel block of `block` slots."""
        return (self.slots.reshape(-1, block) >= 0).sum(-1)

    def on(self, device: torch.device) -> DeviceTiling:
        """Return the tensors of this tiling on a device, uploaded once."""
        return _upload(self, device)


@dataclass(frozen=True, eq=False)
class DeviceTiling:
    """The tensors of a Tiling on one device."""

    slots: torch.Tensor  # int32 [units * unit]
    tokens: torch.Tensor  # float32 [units]
    grid: torch.Tensor  # bool [units]
    grid_units: torch.Tensor  # int64, the units on a grid
    position: torch.Tensor  # float32 [units, 3]
    cut: Cut


@lru_cache(maxsize=64)
def _upload(tiling: Tiling, device: torch.device) -> DeviceTiling:
    return DeviceTiling(
        slots=torch.from_numpy(tiling.slots).to(device),
        tokens=torch.from_numpy(tiling.tokens).to(device, torch.float32),
        grid=torch.from_numpy(tiling.grid).to(device),
        grid_units=torch.from_numpy(tiling.grid.nonzero()[0]).to(device),
        position=torch.from_numpy(tiling.position).to(device, torch.float32),
        cut=Cut(
            tiling.layout.length,
            _side(tiling, tiling.block_q, 1, device),
            _side(tiling, tiling.block_k, tiling.key_parts, device),
        ),
    )


def _side(tiling: Tiling, block: int, parts: int, device: torch.device) -> Side:
    """Return the queries' or keys' side of a static cut; nothing of it belongs to a batch row or head."""
    units, unit = tiling.units * parts, tiling.unit // parts
    tokens = torch.from_numpy(tiling.tokens_per_block(block)).to(device)
    owner = torch.arange(units, device=device).repeat_interleave(unit // block)
    slots = torch.from_numpy(tiling.slots).to(device)
    identity = tiling.identity and tiling.layout.length > (units - 1) * unit  # every unit holds a token
    if identity:  # without an order the kernel counts blocks from the lengths, so drop what is beyond them
        blocks = -(-tiling.layout.length // block)
        tokens, owner, slots = tokens[:blocks], owner[:blocks], slots[: blocks * block]
    whole = bool(((tokens == 0) | (tokens == block)).all())
    on_grid = tiling.grid.repeat(parts).nonzero()[0]
    span = (int(on_grid[0]), int(on_grid[-1]) + 1)
    grid = torch.from_numpy(on_grid).to(device)
    return Side(
        block=block,
        units=units,
        slots=slots[None, None],
        owner=owner[None, None],
        tokens=tokens[None, None],
        grid=grid,
        identity=identity,
        whole=whole,
        per=unit // block,
        span=span if span[1] - span[0] == len(on_grid) else None,
    )


@dataclass(frozen=True)
class _Unit:
    tokens: npt.NDArray[np.int64]
    position: tuple[float, float, float]
    grid: bool
    words: bool = False
    first_frame: bool = False
    sink_rank: int = 1 << 40


@lru_cache(maxsize=64)
def tiling(
    layout: TokenLayout, order: StaticOrder, block_q: int, block_k: int, dilation: orders.Shape = (1, 1, 1)
) -> Tiling:
    """Cut `layout` by `order` into units for kernel tiles of at most `block_q` x `block_k` tokens.

    With a `dilation` tiles hold the tokens of one residue on every axis.
    """
    side = _tile(layout.main, order) if isinstance(order, TileOrder) else None
    lattice = isinstance(order, TileOrder) and not order.packed
    ranked = any(isinstance(s, Grid) and s.role == "text" for s in layout.segments)
    longest = key_run = int(np.prod(side)) if side else max(block_q, block_k)
    if isinstance(order, HilbertOrder | GilbertOrder) and order.key_run:
        longest, key_run = orders.fit_runs(layout.main.length, longest, order.key_run)
    block_q, block_k = _fit_block(longest, block_q), _fit_block(min(longest, key_run), block_k)
    unit = -(-longest // max(block_q, block_k)) * max(block_q, block_k)
    units: list[_Unit] = []
    for start, segment in layout.spans():
        if isinstance(segment, Grid):
            line = segment.role == "text"  # cut as it lies, whatever the order of a grid
            pieces = orders.raster(segment.shape, unit) if line else _pieces(segment.shape, order, side, unit, dilation)
            length = (
                (unit,) * 3
                if line
                else side or (unit ** (1 / max(sum(extent > 1 for extent in segment.shape), 1)),) * 3
            )
            before = start if ranked else 0
            units += _grid_units(start, segment, layout.main, pieces, np.array(length), lattice, before)
        else:
            run = np.arange(start, start + segment.length, dtype=np.int64)
            units += [_Unit(piece, (0.0, 0.0, 0.0), grid=False) for piece in orders.runs(run, unit)]
    slots = np.full((len(units), unit), -1, dtype=np.int32)
    for row, item in zip(slots, units, strict=True):
        row[: len(item.tokens)] = item.tokens
    return Tiling(
        layout=layout,
        unit=unit,
        block_q=block_q,
        block_k=block_k,
        slots=slots.reshape(-1),
        tokens=np.array([len(u.tokens) for u in units]),
        grid=np.array([u.grid for u in units]),
        words=np.array([u.words for u in units]),
        position=np.array([u.position for u in units], dtype=np.float64),
        first_frame=np.array([u.first_frame for u in units]),
        sink_rank=np.array([u.sink_rank for u in units]),
        side=side if lattice else None,
        key_parts=max(longest // key_run, 1),
    )


def _tile(grid: Grid, order: TileOrder) -> orders.Shape:
    return orders.fit_tile(grid.shape, order.picture if grid.frames == 1 else order.video)


def _fit_block(tokens: int, largest: int) -> int:
    """Choose the kernel block that wastes least: padding costs its share, small blocks cost fixed overhead."""
    sizes = [size for size in BLOCKS if size <= largest]
    return min(sizes, key=lambda size: -(-tokens // size) * size * (1 + 16 / size))


def _pieces(
    grid: orders.Shape, order: StaticOrder, side: orders.Shape | None, unit: int, dilation: orders.Shape
) -> list[orders.Array]:
    if isinstance(order, TileOrder) and side is not None:
        return orders.packed(grid, side) if order.packed else orders.tile(grid, side, dilation)
    if isinstance(order, AxesOrder):
        return orders.by_axes(grid, unit, order.axes, order.whole)
    if isinstance(order, HilbertOrder):
        return orders.hilbert(grid, unit)
    return orders.gilbert(grid, unit) if isinstance(order, GilbertOrder) else orders.raster(grid, unit)


def _grid_units(
    start: int,
    grid: Grid,
    main: Grid,
    pieces: list[orders.Array],
    length: npt.NDArray[np.number],
    lattice: bool,
    before: int,
) -> list[_Unit]:
    """Place pieces of a grid, `length` being that of a unit on each axis: in whole units on a lattice, else by mean.

    The grid's first token is that of number `before` among those whose first ones are sinks.
    """
    line = grid.role == "text"
    scale = 1 if line else np.array(main.shape) / np.array(grid.shape)  # a reference lies over what it conditions
    units = []
    for piece in pieces:
        cells = np.stack(np.unravel_index(piece, grid.shape), axis=-1)
        position = (cells[0] // length if lattice else cells.mean(axis=0) / length) * scale
        is_main = grid.role == "main"
        units.append(
            _Unit(
                tokens=piece + start,
                position=(float(position[0]), float(position[1]), float(position[2])),
                grid=True,
                words=line,
                first_frame=is_main and bool((cells[:, 0] == 0).any()),
                sink_rank=before + int(piece.min()) if is_main or line else 1 << 40,
            )
        )
    return units
