"""What every recipe ends in: a Plan, a tuple of disjoint branches whose results merge exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import PlanError
from ..kernels.block_lists import block_lists
from ..kernels.block_sparse import Precision, Predicate, block_sparse_attention
from .cut import Cut


@dataclass(frozen=True, eq=False)
class Operands:
    """What a plan is run on: `q`, `k`, `v` [B, S, H, D], the factor of the logits, a bias [B|1, H|1, keys].

    `precision`: the numbers that branches multiply queries and keys in.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    precision: Precision = "as given"


@dataclass(frozen=True, eq=False)
class Branch:
    """Key blocks per query block, with the orders that say which tokens the blocks hold.

    `index` int32 [B|1, H|1, query blocks, M] key-block ids, of which the first `count` are used and the first
    `full_count` hold no holes and need no predicate. `q_order`, `k_order` int32 [B|1, H|1, slots]: slot to
    token, -1 a hole, None the identity. `key_bias` float [B|1, H|1, keys] is added to the logits.
    `skip_heads` bool [B|1, H] marks heads that this branch leaves out on purpose. `every_query`: each query lies in
    some slot. `pack`: keys are read often enough to be copied into slot order first.
    """

    block_q: int
    block_k: int
    index: torch.Tensor
    count: torch.Tensor
    full_count: torch.Tensor | None = None
    q_order: torch.Tensor | None = None
    k_order: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    predicate: Predicate | None = None
    skip_heads: torch.Tensor | None = None
    every_query: bool = False
    pack: bool = True

    @property
    def nbytes(self) -> int:
        tensors = (self.index, self.count, self.full_count, self.q_order, self.k_order, self.key_bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def run(self, given: Operands) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the branch; return out [B, S, H, D] and lse [B, H, S]."""
        return block_sparse_attention(
            given.q,
            given.k,
            given.v,
            self.index,
            self.count,
            block_q=self.block_q,
            block_k=self.block_k,
            full_count=self.full_count,
            q_order=self.q_order,
            k_order=self.k_order,
            key_bias=_add(self.key_bias, given.bias),
            predicate=self.predicate,
            scale=given.scale,
            every_query=self.every_query,
            pack=self.pack,
            precision=given.precision,
        )

    def block_mask(self, key_blocks: int) -> torch.Tensor:
        """Return which blocks are computed, bool [B|1, H|1, query blocks, key blocks]."""
        used = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        # unused entries are sent to an extra column, so that they cannot erase a used one
        target = torch.where(used, self.index, key_blocks).long()
        mask = torch.zeros(*self.index.shape[:-1], key_blocks + 1, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, target, True)[..., :key_blocks]


Result = tuple[torch.Tensor, torch.Tensor]  # out [B, S, H, D] and lse [B, H, S]


class Pooled(Protocol):
    """A further branch over pooled keys or through agents: it stands for pairs that are not computed.

    `into`: what the branches before it came to; the result is that over all.
    """

    @property
    def nbytes(self) -> int: ...

    def run(self, given: Operands, into: Result | None = None) -> Result: ...


class Fix(Protocol):
    """A change of the merged output [B, S, H, D], which came with the log-sum-exps [B, H, S]."""

    def apply(self, out: torch.Tensor, lse: torch.Tensor, given: Operands) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """Which pairs of an attention call of `queries` x `keys` tokens are computed.

    No branches means dense: every pair, by the stock attention. `pairs` is the number of computed pairs per
    (batch, head) as a tensor, so that the density can be had without waiting for the device. `pooled` and `fixes` are
    what a correction adds; they compute no pairs. `measures` says why a call is computed in full all the same.
    `precision`: the numbers that the branches multiply queries and keys in.
    `operator` names the mathematics that is no subset of softmax pairs: such a plan has one in `pooled`, and no mask.
    """

    queries: int
    keys: int
    branches: tuple[Branch, ...] = ()
    pairs: torch.Tensor | None = None
    note: str = ""
    pooled: tuple[Pooled, ...] = ()
    fixes: tuple[Fix, ...] = ()
    measures: str = ""
    precision: Precision = "as given"
    operator: str = ""

    @property
    def dense(self) -> bool:
        return not self.branches and not self.pooled

    @property
    def nbytes(self) -> int:
        """Bytes of the index lists, orders and biases."""
        return sum(branch.nbytes for branch in (*self.branches, *self.pooled))

    def counts(self) -> Plan:
        """Return what a report needs of the plan: the pairs, without the lists."""
        return Plan(self.queries, self.keys, pairs=self.pairs)

    def density(self) -> torch.Tensor:
        """Return computed over possible pairs, a float32 scalar tensor."""
        if self.pairs is None:
            return torch.ones(())
        return self.pairs.float().mean() / (self.queries * self.keys)

    def density_per_head(self) -> torch.Tensor:
        """Return the density of each (batch, head), float32 [B|1, H|1]."""
        if self.pairs is None:
            return torch.ones(1, 1)
        return self.pairs.float() / (self.queries * self.keys)

    def to_mask(self) -> torch.Tensor:
        """Return the exact mask of pairs, bool [B|1, H|1, queries, keys] (for tests and pictures: quadratic).

        Raises PlanError where an operator has none.
        """
        self._refuse_operator()
        if self.dense:
            return torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool)
        mask = self._branch_mask(self.branches[0])
        for branch in self.branches[1:]:
            mask = mask | self._branch_mask(branch)
        return mask

    def _refuse_operator(self) -> None:
        if self.operator:
            raise PlanError(f"plan: {self.operator} is an operator, which computes no pairs and has no mask of them.")

    def _branch_mask(self, branch: Branch) -> torch.Tensor:
        q_slots, k_slots = self._slots(branch)
        blocks = branch.block_mask(k_slots.shape[-1] // branch.block_k)
        pairs = blocks.repeat_interleave(branch.block_q, -2).repeat_interleave(branch.block_k, -1)
        b = max(pairs.shape[0], q_slots.shape[0], k_slots.shape[0])
        h = max(pairs.shape[1], q_slots.shape[1], k_slots.shape[1])
        pairs = pairs.expand(b, h, -1, -1)
        mask = torch.zeros(b, h, self.queries + 1, self.keys + 1, dtype=torch.bool, device=pairs.device)
        for i in range(b):
            for j in range(h):
                rows = q_slots[min(i, len(q_slots) - 1), min(j, q_slots.shape[1] - 1)]
                cols = k_slots[min(i, len(k_slots) - 1), min(j, k_slots.shape[1] - 1)]
                mask[i, j, rows[:, None], cols[None]] |= pairs[i, j]  # holes index the extra row and column
        mask = mask[..., : self.queries, : self.keys]
        return mask & _admitted(branch.predicate, mask) if branch.predicate is not None else mask

    def _slots(self, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
        device = branch.index.device
        out = []
        for order, block, length in (
            (branch.q_order, branch.block_q, self.queries),
            (branch.k_order, branch.block_k, self.keys),
        ):
            if order is None:
                slots = torch.arange(-(-length // block) * block, device=device)
                slots = torch.where(slots < length, slots, -1)[None, None]
            else:
                slots = order
            out.append(slots.long())
        return out[0], out[1]

    def rows(self, queries: torch.Tensor, sample: int = 0, head: int = 0) -> torch.Tensor:
        """Return the exact mask of some queries of one sample and head, bool [len(queries), keys].

        `queries` int64 token indices. What `to_mask` would say of them, without the memory of all pairs.
        """
        self._refuse_operator()
        device = queries.device if self.dense else self.branches[0].index.device
        queries = queries.to(device)
        out = torch.full((len(queries), self.keys), self.dense, dtype=torch.bool, device=device)
        for branch in self.branches:
            q_slots, k_slots = (_one(slots, sample, head) for slots in self._slots(branch))
            blocks = _one(branch.block_mask(len(k_slots) // branch.block_k), sample, head)
            slot_of = torch.full((self.queries + 1,), -1, device=device)  # the last is where holes point to
            slot_of[q_slots] = torch.arange(len(q_slots), device=device)
            slot = slot_of[queries]
            pairs = blocks[slot // branch.block_q] & (slot >= 0)[:, None]
            mask = torch.zeros(len(queries), self.keys + 1, dtype=torch.bool, device=device)
            mask[:, k_slots] = pairs.repeat_interleave(branch.block_k, -1)
            if branch.predicate is not None:
                theirs = replace(branch.predicate, q_coords=branch.predicate.q_coords[:, queries])
                mask[:, :-1] &= _admitted(theirs, mask)
            out |= mask[:, :-1]
        return out

    def check(self) -> Plan:
        """Raise PlanError when an index is out of range, a row is empty or branches overlap; return the plan.

        What an operator computes beside its branches is not looked at.
        """
        for branch in self.branches:
            _, k_slots = self._slots(branch)
            blocks = k_slots.shape[-1] // branch.block_k
            used = torch.arange(branch.index.shape[-1], device=branch.index.device) < branch.count[..., None]
            if bool((used & ((branch.index < 0) | (branch.index >= blocks))).any()):
                raise PlanError(f"plan: a key-block index lies outside 0..{blocks - 1}.")
            if int(branch.block_mask(blocks).sum()) != int(used.expand_as(branch.index).sum()):
                raise PlanError("plan: a key block is listed twice for one query block.")
        if self.dense or self.operator:
            return self
        masks = [self._branch_mask(branch) for branch in self.branches]
        total = torch.stack(torch.broadcast_tensors(*[m.to(torch.uint8) for m in masks])).sum(0)
        if bool((total > 1).any()):
            raise PlanError("plan: two branches compute the same pair; merging would count it twice.")
        empty = ~(total > 0).any(-1)
        for branch in self.branches:
            if branch.skip_heads is not None:
                empty = empty & ~torch.atleast_2d(branch.skip_heads)[:, :, None].to(empty.device)
        if bool(empty.any()):
            where = tuple(int(n) for n in empty.nonzero()[0])
            raise PlanError(f"plan: query {where[2]} of batch {where[0]}, head {where[1]} has no key.")
        return self

    def draw(self, size: int = 512) -> Image.Image:
        """Draw the mask of every head side by side, white where pairs are computed (first sample)."""
        tiles = [np.asarray(m.cpu(), dtype=np.uint8) * 255 for m in self.to_mask()[0]]
        pictures = [Image.fromarray(m).resize((size, size), Image.Resampling.BOX) for m in tiles]
        sheet = Image.new("L", (len(pictures) * (size + 8) - 8, size), 96)
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (i * (size + 8), 0))
        return sheet


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a + b if a is not None and b is not None else a if a is not None else b


def _one(x: torch.Tensor, sample: int, head: int) -> torch.Tensor:
    """Return the part of a tensor [B|1, H|1, ...] that belongs to one sample and head."""
    for what, size, asked in (("samples", x.shape[0], sample), ("heads", x.shape[1], head)):
        if asked < 0 or (size > 1 and asked >= size):
            raise PlanError(f"plan: it has {size} {what}, number {asked} was asked for.")
    return x[min(sample, x.shape[0] - 1), min(head, x.shape[1] - 1)]


def _admitted(predicate: Predicate, like: torch.Tensor) -> torch.Tensor:
    """Evaluate the closed-form token predicate on all pairs, bool [queries, keys]."""
    delta = (predicate.q_coords[:, :, None] - predicate.k_coords[:, None, :]).abs().to(like.device)
    r = predicate.radius
    if predicate.kind == "box":
        return (delta[0] <= r[0]) & (delta[1] <= r[1]) & (delta[2] <= r[2])
    if predicate.kind == "disk":
        return (delta[0] <= r[0]) & (delta[1] ** 2 + delta[2] ** 2 <= r[1] ** 2)
    return delta[0] <= r[0]


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """A decision at rest between steps: one bit per unit pair instead of index lists, and how the tokens lie."""

    bits: torch.Tensor  # uint8 [B|1, H|1, query units, ceil(key units / 8)]
    cut: Cut
    note: str = field(default="")
    skip_heads: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.bits.numel() + self.cut.nbytes

    @classmethod
    def pack(cls, mask: torch.Tensor, cut: Cut, note: str = "", skip_heads: torch.Tensor | None = None) -> PackedPlan:
        """Pack a unit mask, bool [B|1, H|1, query units, key units]."""
        ones = mask.view(torch.uint8)
        if mask.shape[-1] % 8:
            ones = torch.nn.functional.pad(ones, (0, -mask.shape[-1] % 8))
        bits = (ones.unflatten(-1, (-1, 8)) * _bit_values(mask.device)).sum(-1, dtype=torch.uint8)
        return cls(bits, cut, note, skip_heads)

    def expand(self) -> Plan:
        """Rebuild the index lists."""
        return replace(from_units(self.bits, self.cut, self.skip_heads), note=self.note)


def from_units(mask: torch.Tensor, cut: Cut, skip_heads: torch.Tensor | None = None) -> Plan:
    """Turn a mask over unit pairs, bool [B|1, H|1, query units, key units] or as bits, into a one-branch plan.

    Blocks that hold no token are left out; blocks without holes are marked full. `skip_heads` bool [B|1, H] marks heads
    that compute nothing on purpose. Nothing is read back from the device.
    """
    q, k = cut.q, cut.k
    lists = block_lists(mask, q.owner, k.owner, q.tokens, k.tokens, k.block)
    branch = Branch(
        block_q=q.block,
        block_k=k.block,
        index=lists.index,
        count=lists.count,
        # the same tensor tells the kernel that nothing is partial, so that it compiles without the masked loop
        full_count=lists.count if k.identity or k.whole else lists.full_count,
        q_order=None if q.identity else q.slots,
        k_order=None if k.identity else k.slots,
        skip_heads=skip_heads,
        every_query=True,
    )
    return Plan(queries=cut.length, keys=cut.length, branches=(branch,), pairs=lists.pairs.sum(-1))


@lru_cache(maxsize=16)
def _bit_values(device: torch.device) -> torch.Tensor:
    """Return what the bits of a byte are worth, the lowest first, uint8 [8]."""
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
