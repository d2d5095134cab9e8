"""The true attention of one call, a run of queries at a time: where its mass lies, and what a plan keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .call import AttentionCall
from .sparsity.plan import Plan

CHUNK = 1 << 26  # attention weights held at once


@dataclass(frozen=True, eq=False)
class Measured:
    """One plan held against the true attention of one call, in each sample and head; all on the CPU.

    `recall` float64 [B, H]: share of the softmax mass on the computed pairs. `best_recall` [B, H]: the most that any
    choice among the plan's blocks could keep with as many pairs in that head, the last block counted in part. `wrong`,
    `whole` [B, H]: squared norms of (output - true output) and of the true output. Over block pairs, float32
    [B, H, query blocks, key blocks]: `mass` sums to the tokens of a head, `pairs` counts what there is, `chosen` and
    `oracle` are the shares of each block's pairs that were computed and that the best choice takes. `q_block`,
    `k_block` int64 [B|1, H|1, tokens]: the block of each token.
    """

    recall: torch.Tensor
    best_recall: torch.Tensor
    wrong: torch.Tensor
    whole: torch.Tensor
    mass: torch.Tensor
    pairs: torch.Tensor
    chosen: torch.Tensor
    oracle: torch.Tensor
    q_block: torch.Tensor
    k_block: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """Norm of the output's error over the norm of the true output, float64 [B, H]."""
        return relative(self.wrong, self.whole)

    @property
    def density(self) -> torch.Tensor:
        """Computed over possible pairs, float64 [B, H]."""
        computed = (self.chosen.double() * self.pairs).sum((-1, -2))
        return computed / self.pairs.double().sum((-1, -2))


def relative(wrong: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return the relative error from squared norms; where there is nothing to be right about, 0."""
    return torch.where(whole > 0, wrong / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0).sqrt()


def weights(call: AttentionCall) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (queries [n], softmax weights [B, H, n, S]) in float32 until all queries are done."""
    b, s, h, _ = call.q.shape
    k = call.k.float().permute(0, 2, 3, 1)
    step = max(1, CHUNK // (b * h * call.k.shape[1]))
    for queries in torch.arange(s, device=call.q.device).split(step):
        logits = call.q[:, queries].float().transpose(1, 2) @ k * call.scale
        if call.key_bias is not None:
            logits = logits + call.key_bias.float()[:, :, None]
        yield queries, logits.softmax(-1)


def block_mass(call: AttentionCall, q_slots: torch.Tensor, k_slots: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Return the softmax mass between blocks, float32 [B, H, query blocks, key blocks]; it sums to S per head.

    `q_slots`, `k_slots` [B|1, H|1, slots]: the token in each slot, -1 a hole; a query block is `rows` slots, a key
    block `cols`.
    """
    b, _, h, _ = call.q.shape
    blocks = q_slots.shape[-1] // rows, k_slots.shape[-1] // cols
    q_block, k_block = (
        _block_of(slots.expand(b, h, -1), size, length)
        for slots, size, length in ((q_slots, rows, call.q.shape[1]), (k_slots, cols, call.k.shape[1]))
    )
    mass = torch.zeros(b, h, *blocks, device=call.q.device)
    for queries, part in weights(call):
        by_key = torch.zeros(*part.shape[:-1], blocks[1], device=part.device)
        by_key.scatter_add_(-1, k_block[:, :, None].expand_as(part), part)
        target = q_block[..., queries, None].expand_as(by_key)
        mass.scatter_add_(-2, target, by_key)
    return mass


@torch.no_grad()
def measure(call: AttentionCall, plan: Plan, out: torch.Tensor) -> Measured:
    """Hold a sparse plan and the output [B, S, H, D] it led to against the true attention of the call.

    The plan's blocks are those of its first branch; all branches of a plan lie alike.
    """
    b, _, h, _ = call.q.shape
    branch = plan.branches[0]
    q_slots = _slots(branch.q_order, branch.block_q, plan.queries, branch.index.device)
    k_slots = _slots(branch.k_order, branch.block_k, plan.keys, branch.index.device)
    q_block, k_block = _block_of(q_slots, branch.block_q, plan.queries), _block_of(k_slots, branch.block_k, plan.keys)
    filled_q = (q_slots >= 0).unflatten(-1, (-1, branch.block_q)).sum(-1)
    filled_k = (k_slots >= 0).unflatten(-1, (-1, branch.block_k)).sum(-1)
    pairs = (filled_q[..., :, None] * filled_k[..., None, :]).float().expand(b, h, -1, -1)
    sums = torch.zeros(3, b, h, dtype=torch.float64, device=call.q.device)
    mass, chosen = torch.zeros_like(pairs), torch.zeros_like(pairs)
    by_block = whole_blocks(plan)
    if by_block:
        chosen += pairs * branch.block_mask(pairs.shape[-1])
    for i in range(b):
        for j in range(h):
            rows, cols = _one(q_block, i, j), _one(k_block, i, j)
            for queries, part in weights(_alone(call, i, j)):
                here, there = rows[queries], part[0, 0]
                _add_blocks(mass[i, j], there, here, cols)
                if not by_block:
                    mask = plan.rows(queries, i, j)
                    _add_blocks(chosen[i, j], mask.float(), here, cols)
                    sums[0, i, j] += (there * mask).sum()
                true = there @ call.v[i, :, j].float()
                wrong = out[i, queries, j].float() - true
                sums[1:, i, j] += torch.stack([wrong.square().sum(), true.square().sum()])
    if by_block:
        sums[0] = (mass * (chosen > 0)).double().sum((-1, -2))
    oracle = best_share(mass, pairs, chosen.double().sum((-1, -2)))
    kept, wrong, whole = sums.cpu()
    queries = call.q.shape[1]
    return Measured(
        recall=kept / queries,
        best_recall=(mass * oracle).double().sum((-1, -2)).cpu() / queries,
        wrong=wrong,
        whole=whole,
        mass=mass.cpu(),
        pairs=pairs.cpu(),
        chosen=(chosen / pairs.clamp(min=1)).cpu(),
        oracle=oracle.cpu(),
        q_block=q_block.cpu(),
        k_block=k_block.cpu(),
    )


def best_share(mass: torch.Tensor, pairs: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Return which share of each block the best choice takes, float32 like `mass` [B, H, query blocks, key blocks].

    Blocks of most `mass` a pair first, until `budget` [B, H] pairs are spent; the last is taken in part.
    """
    flat = pairs.flatten(-2)
    order = (mass.flatten(-2) / flat.clamp(min=1)).argsort(-1, descending=True)
    cost = flat.gather(-1, order).double()
    room = budget[..., None] - (cost.cumsum(-1) - cost)
    share = (room / cost.clamp(min=1)).clamp(0, 1).float() * (cost > 0)
    return torch.zeros_like(flat).scatter_(-1, order, share).view_as(mass)


@dataclass(frozen=True)
class Quality:
    """What one plan does to one call, over its samples, heads and queries.

    `recall`, `best_recall`: means of `Measured`'s; None where an operator computes no pairs, `best_recall` also where a
    plan computes parts of blocks, because whole blocks are no bound for it. `error`: norm of (output - true output)
    over the norm of the true output.
    """

    recall: float | None
    best_recall: float | None
    error: float


def quality(call: AttentionCall, plan: Plan, out: torch.Tensor) -> Quality:
    """Hold a plan and the output [B, S, H, D] it led to against the true attention of the call, in three figures."""
    if plan.operator or plan.dense or plan.measures:
        kept = None if plan.operator else 1.0
        return Quality(kept, kept, _error(call, out))
    seen = measure(call, plan, out)
    best = float(seen.best_recall.mean()) if whole_blocks(plan) else None
    return Quality(float(seen.recall.mean()), best, float(relative(seen.wrong.sum(), seen.whole.sum())))


def whole_blocks(plan: Plan) -> bool:
    """Say whether a plan computes each of its blocks whole or not at all."""
    return len(plan.branches) == 1 and plan.branches[0].predicate is None


def _error(call: AttentionCall, out: torch.Tensor) -> float:
    v, wrong, whole = call.v.float().transpose(1, 2), 0.0, 0.0
    for queries, part in weights(call):
        true = (part @ v).transpose(1, 2)
        wrong += float((out[:, queries].float() - true).square().sum())
        whole += float(true.square().sum())
    return (wrong / whole) ** 0.5 if whole else 0.0


def _add_blocks(total: torch.Tensor, part: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> None:
    """Add [n, S] values to the blocks [query blocks, key blocks] that `rows` [n] and `cols` [S] name."""
    by_key = torch.zeros(len(part), total.shape[1], device=part.device).index_add_(1, cols, part)
    total.index_add_(0, rows, by_key)


def _alone(call: AttentionCall, sample: int, head: int) -> AttentionCall:
    """Return the call of one sample and head, as views."""
    q, k, v = (x[sample : sample + 1, :, head : head + 1] for x in (call.q, call.k, call.v))
    bias = None if call.key_bias is None else _one(call.key_bias, sample, head)[None, None]
    return replace(call, q=q, k=k, v=v, key_bias=bias)


def _one(x: torch.Tensor, sample: int, head: int) -> torch.Tensor:
    """Return the part of a tensor [B|1, H|1, ...] that belongs to one sample and head."""
    return x[min(sample, x.shape[0] - 1), min(head, x.shape[1] - 1)]


def _slots(order: torch.Tensor | None, size: int, length: int, device: torch.device) -> torch.Tensor:
    """Return the token in each slot, [B|1, H|1, slots], -1 a hole, also where the tokens lie as they are."""
    if order is not None:
        return order
    slots = torch.arange(-(-length // size) * size, device=device)
    return slots.masked_fill(slots >= length, -1)[None, None]


def _block_of(slots: torch.Tensor, size: int, length: int) -> torch.Tensor:
    """Return the block that each token lies in, int64 [B|1, H|1, length]."""
    out = torch.zeros(*slots.shape[:2], length + 1, dtype=torch.long, device=slots.device)
    block = (torch.arange(slots.shape[-1], device=slots.device) // size).expand(slots.shape)
    out.scatter_(-1, torch.where(slots < 0, length, slots).long(), block)  # holes fall into the spare last entry
    return out[..., :-1]
