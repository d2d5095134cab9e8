"""How the tokens of one call lie in units, blocks and slots, per batch row and head where that differs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, eq=False)
class Side:
    """The queries or the keys of a cut.

    `slots` int32 [B|1, H|1, blocks * block]: the token in each slot, -1 a hole. `owner` int64 [B|1, H|1, blocks]: the
    unit a block belongs to. `tokens` int64 [B|1, H|1, blocks]: real tokens in each block. `grid` int64: the units on a
    grid, the others hold text. `identity`: slots are the tokens as they lie. `whole`: no block that holds a token holds
    a hole, as far as is known without asking the device. `means` float [B, H, units on a grid, D], where the order
    brought them along. `per`: blocks of every unit, 0 where units differ.
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

    @property
    def shared(self) -> bool:
        """Whether all batch rows and heads lie alike."""
        return self.slots.shape[:2] == (1, 1)

    @property
    def weights(self) -> torch.Tensor:
        """Tokens of each unit, float32 [B|1, H|1, units]."""
        zeros = torch.zeros(*self.tokens.shape[:2], self.units, device=self.tokens.device)
        return zeros.scatter_add_(-1, self.owner, self.tokens.float())  # whole numbers: exact in any order

    @property
    def nbytes(self) -> int:
        """Bytes that belong to this call alone."""
        return 0 if self.shared else sum(t.numel() * t.element_size() for t in (self.slots, self.owner, self.tokens))

    def without_means(self) -> Side:
        """Return the side without the means it was decided by, which may be those of an earlier step."""
        return replace(self, means=None)

    def unit_of_token(self, length: int) -> torch.Tensor:
        """Return the unit each of `length` tokens lies in, int64 [B|1, H|1, length]."""
        unit = self.owner.repeat_interleave(self.block, -1)
        where = torch.where(self.slots < 0, length, self.slots).long()
        out = torch.zeros(*unit.shape[:2], length + 1, dtype=torch.int64, device=unit.device)
        return out.scatter_(-1, where, unit)[..., :length]


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
    b, h, n = order.shape
    units, device = sizes.shape[-1], order.device
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
    position = (first[..., None] + slot).clamp(max=n - 1).flatten(-2).expand(b, h, -1)
    slots = order.gather(-1, position).unflatten(-1, (-1, block))
    slots = slots.masked_fill(slot >= left[..., None], -1).flatten(-2)
    words = len(text) // block
    ends = torch.arange(units, units + words, device=device).expand(*owner.shape[:2], -1)
    full = (text.view(-1, block) >= 0).sum(-1).expand(*owner.shape[:2], -1)
    return Side(
        block=block,
        units=units + words,
        slots=torch.cat([slots, text.expand(b, h, -1)], -1),
        owner=torch.cat([owner, ends], -1).expand(b, h, -1),
        tokens=torch.cat([left, full], -1).expand(b, h, -1),
        grid=torch.arange(units, device=device),
        means=means,
    )
