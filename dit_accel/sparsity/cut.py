"""How the tokens of one call lie in units, blocks and slots, per batch row and head where that differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the keys of a cut.

    `slots` int32 [B|1, H|1, blocks * block]: the token in each slot, -1 a hole. `owner` int64 [B|1, H|1, blocks]: the
    unit a block belongs to; it never falls from one block to the next. `tokens` int64 [B|1, H|1, blocks]: real tokens
    in each block. `grid` int64: the units on a grid, the others hold text; `span`: the first of them and the one behind
    the last, where they follow each other. `identity`: slots are the tokens as they lie. `whole`: no block that holds a
    token holds a hole, as far as is known without asking the device. `means` float [B, H, units on a grid, D], where
    the order brought them along. `per`: blocks of every unit, 0 where units differ.
    """

    block: int
    units: int
    slots: torch.Tensor
    owner: torch.Tensor
    tokens: torch.Tensor
    grid: torch.Tensor
    identity: bool = False
    whole: bool = False
    means: torch.Tensor | None = None
    per: int = 0
    span: tuple[int, int] | None = None

    @property
    def shared(self) -> bool:
        """Whether all batch rows and heads lie alike."""
        return self.slots.shape[:2] == (1, 1)

    @cached_property
    def weights(self) -> torch.Tensor:
        """Tokens of each unit, float32 [B|1, H|1, units]."""
        zeros = torch.zeros(*self.tokens.shape[:2], self.units, device=self.tokens.device)
        return zeros.scatter_add_(-1, self.owner, self.tokens.float())  # whole numbers: exact in any order

    @cached_property
    def grid_weights(self) -> torch.Tensor:
        """Tokens of each unit on a grid, float32 [B|1, H|1, units on a grid]."""
        return self.on_grid(self.weights, -1)

    @cached_property
    def grid_log_weights(self) -> torch.Tensor:
        """The logarithms of those, -inf for a unit without tokens."""
        return self.grid_weights.log()

    @cached_property
    def bounds(self) -> torch.Tensor:
        """The first slot of each unit and the end, int64 [B|1, H|1, units + 1]."""
        units = torch.arange(self.units + 1, device=self.owner.device).expand(*self.owner.shape[:2], -1)
        return torch.searchsorted(self.owner.contiguous(), units.contiguous()) * self.block

    @cached_property
    def grid_slots(self) -> torch.Tensor | None:
        """The slots of the units on a grid, int32 [B|1, H|1, slots], where all units have as many of them."""
        if not self.per:
            return None
        if self.span is not None:
            first, end = (at * self.per * self.block for at in self.span)
            return self.slots[..., first:end]
        unit = self.per * self.block
        padded = torch.nn.functional.pad(self.slots, (0, self.units * unit - self.slots.shape[-1]), value=-1)
        return padded.unflatten(-1, (-1, unit))[:, :, self.grid].flatten(-2)

    @cached_property
    def grid_bounds(self) -> torch.Tensor:
        """Where each unit on a grid begins and the last one ends in their slots, int64 [B|1, H|1, units + 1]."""
        if self.grid_slots is not None:
            return torch.arange(len(self.grid) + 1, device=self.slots.device)[None, None] * (self.per * self.block)
        return self.bounds[..., : len(self.grid) + 1]  # units of text lie behind those on a grid

    @cached_property
    def grid_costs(self) -> torch.Tensor:
        """Tokens of each unit on a grid, at least 1: what computing it costs; float32 [B|1, H|1, units on a grid]."""
        return self.grid_weights.clamp(min=1)

    def on_grid(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the units on a grid of one axis of a tensor, without a copy where they follow each other."""
        if self.span is not None:
            return x.narrow(axis, self.span[0], self.span[1] - self.span[0])
        return x.index_select(axis, self.grid)

    @property
    def nbytes(self) -> int:
        """Bytes that belong to this call alone."""
        return 0 if self.shared else sum(t.numel() * t.element_size() for t in (self.slots, self.owner, self.tokens))

    def without_means(self) -> Side:
        """Return the side without the means it was decided by, which may be those of an earlier step."""
        return self if self.per else replace(self, means=None)

    def unit_of_token(self, length: int) -> torch.Tensor:
        """Return the unit each of `length` tokens lies in, int64 [B|1, H|1, length]."""
        return _unit_of_token(self, length) if self.per else self._unit_of_token(length)

    def _unit_of_token(self, length: int) -> torch.Tensor:
        unit = self.owner.repeat_interleave(self.block, -1)
        where = torch.where(self.slots < 0, length, self.slots).long()
        out = torch.zeros(*unit.shape[:2], length + 1, dtype=torch.int64, device=unit.device)
        return out.scatter_(-1, where, unit)[..., :length]


@lru_cache(maxsize=128)
def _unit_of_token(side: Side, length: int) -> torch.Tensor:
    """Remember the answer for a side that depends on the layout alone."""
    return side._unit_of_token(length)


@dataclass(frozen=True, eq=False)
class Cut:
    """Both sides of a call of `length` tokens."""

    length: int
    q: Side
    k: Side

    @property
    def nbytes(self) -> int:
        """Bytes that belong to this call alone."""
        return self.q.nbytes + self.k.nbytes

    def at_rest(self) -> Cut:
        """Return the cut as it is kept between steps: without means, which belong to one step."""
        return replace(self, q=self.q.without_means(), k=self.k.without_means())


def from_sorted(
    order: torch.Tensor, sizes: torch.Tensor, block: int, text: torch.Tensor, means: torch.Tensor | None = None
) -> Side:
    """Cut tokens that lie sorted by unit into blocks that never mix two units, one unit after the other.

    `order` int32 [B, H, n]: tokens, those of unit 0 first. `sizes` int64 [B|1, H|1, units]: tokens of each unit. `text`
    int32 [text blocks * block]: further slots, each block a unit of its own. The number of blocks is the most that
    any sizes could need, so that nothing is read back from the device; the unused ones hold no token.
    """
    return places(sizes, order.shape[-1], block, text).lay(order, means)


@dataclass(frozen=True, eq=False)
class Places:
    """How units of known sizes lie in blocks, whatever their tokens: what `from_sorted` can make once for many orders.

    `position` int64 [B|1, H|1, slots]: which token of the sorted ones lies in a slot before the text, with `hole`
    where none does. The others are as in `Side`.
    """

    block: int
    units: int
    position: torch.Tensor
    hole: torch.Tensor
    text: torch.Tensor
    owner: torch.Tensor
    tokens: torch.Tensor
    grid: torch.Tensor

    def lay(self, order: torch.Tensor, means: torch.Tensor | None = None) -> Side:
        """Lay sorted tokens, int32 [B, H, n], in their blocks."""
        b, h, _ = order.shape
        slots = order.gather(-1, self.position.expand(b, h, -1)).masked_fill(self.hole, -1)
        if len(self.text):
            slots = torch.cat([slots, self.text.expand(b, h, -1)], -1)
        return Side(
            block=self.block,
            units=self.units,
            slots=slots,
            owner=self.owner.expand(b, h, -1),
            tokens=self.tokens.expand(b, h, -1),
            grid=self.grid,
            means=means,
            span=(0, len(self.grid)),
        )


def places(sizes: torch.Tensor, n: int, block: int, text: torch.Tensor) -> Places:
    """Cut `n` tokens of units of these sizes into blocks; arguments as in `from_sorted`."""
    units, device = sizes.shape[-1], sizes.device
    needed = (sizes + block - 1) // block
    last_block, last_token = needed.cumsum(-1), sizes.cumsum(-1)
    blocks = torch.arange((n + units * (block - 1)) // block, device=device)
    ids = blocks.expand(*sizes.shape[:2], -1).contiguous()
    owner = torch.searchsorted(last_block, ids, right=True)
    used = owner < units
    owner = owner.clamp(max=units - 1)
    within = (ids - (last_block - needed).gather(-1, owner)) * block
    left = (sizes.gather(-1, owner) - within).clamp(min=0, max=block) * used
    first = (last_token - sizes).gather(-1, owner) + within
    slot = torch.arange(block, device=device)
    words = len(text) // block
    ends = torch.arange(units, units + words, device=device).expand(*owner.shape[:2], -1)
    full = (text.view(-1, block) >= 0).sum(-1).expand(*owner.shape[:2], -1)
    return Places(
        block=block,
        units=units + words,
        position=(first[..., None] + slot).clamp(max=n - 1).flatten(-2),
        hole=(slot >= left[..., None]).flatten(-2),
        text=text,
        owner=torch.cat([owner, ends], -1),
        tokens=torch.cat([left, full], -1),
        grid=torch.arange(units, device=device),
    )
