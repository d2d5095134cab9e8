"""The true attention of one call, a run of queries at a time: where its mass lies, and what a plan keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dit_accel.call import AttentionCall
from dit_accel.sparsity.plan import Branch, Plan

CHUNK = 1 << 26  # attention weights held at once


@dataclass(frozen=True)
class Quality:
    """What one plan does to one call, means over its samples, heads and queries.

    `recall`: share of the softmax mass on the computed pairs; None where an operator computes none. `best_recall`: the
    most that any choice among the plan's own blocks could keep with as many pairs per head, the last block counted in
    part; None where a plan has several branches, a predicate or an operator. `error`: norm of (output - true output) /
    norm of the true output.
    """

    recall: float | None
    best_recall: float | None
    error: float


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


def quality(call: AttentionCall, plan: Plan, out: torch.Tensor) -> Quality:
    """Hold a plan and the output [B, S, H, D] it led to against the true attention of the call."""
    b, s, h, _ = call.q.shape
    v = call.v.float().transpose(1, 2)
    kept, wrong, whole = 0.0, 0.0, 0.0
    for queries, part in weights(call):
        if not plan.operator:
            mask = torch.stack([torch.stack([plan.rows(queries, i, j) for j in range(h)]) for i in range(b)])
            kept += float((part * mask.to(part.device)).sum())
        true = (part @ v).transpose(1, 2)
        wrong += float((out[:, queries].float() - true).square().sum())
        whole += float(true.square().sum())
    recall = None if plan.operator else kept / (b * h * s)
    return Quality(recall, _best_recall(call, plan), (wrong / whole) ** 0.5 if whole else 0.0)


def _best_recall(call: AttentionCall, plan: Plan) -> float | None:
    if plan.dense:
        return 1.0
    if plan.operator or len(plan.branches) > 1 or plan.branches[0].predicate is not None or plan.pairs is None:
        return None
    branch = plan.branches[0]
    q_slots, k_slots = _slots(branch, branch.q_order, plan.queries), _slots(branch, branch.k_order, plan.keys, True)
    mass = block_mass(call, q_slots, k_slots, branch.block_q, branch.block_k).flatten(-2)
    filled_q = (q_slots >= 0).unflatten(-1, (-1, branch.block_q)).sum(-1)
    filled_k = (k_slots >= 0).unflatten(-1, (-1, branch.block_k)).sum(-1)
    pairs = (filled_q[..., :, None] * filled_k[..., None, :]).flatten(-2).float().expand_as(mass)
    order = (mass / pairs.clamp(min=1)).argsort(-1, descending=True)
    cost = pairs.gather(-1, order)
    room = plan.pairs.to(mass.device).float().expand(mass.shape[:2])[..., None] - (cost.cumsum(-1) - cost)
    share = (room / cost.clamp(min=1)).clamp(0, 1)
    return float((mass.gather(-1, order) * share).sum() / (mass.shape[0] * mass.shape[1] * call.q.shape[1]))


def _slots(branch: Branch, order: torch.Tensor | None, length: int, keys: bool = False) -> torch.Tensor:
    if order is not None:
        return order
    size = branch.block_k if keys else branch.block_q
    slots = torch.arange(-(-length // size) * size, device=branch.index.device)
    return slots.masked_fill(slots >= length, -1)[None, None]


def _block_of(slots: torch.Tensor, size: int, length: int) -> torch.Tensor:
    """Return the block that each token lies in, int64 [B, H, length]."""
    out = torch.zeros(*slots.shape[:2], length + 1, dtype=torch.long, device=slots.device)
    block = (torch.arange(slots.shape[-1], device=slots.device) // size).expand(slots.shape)
    out.scatter_(-1, torch.where(slots < 0, length, slots).long(), block)  # holes fall into the spare last entry
    return out[..., :-1]
