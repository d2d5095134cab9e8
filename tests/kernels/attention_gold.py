"""The slow, obvious truth that every back end is held against, and the error it may make."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

Call = dict[str, Any]  # the arguments of block_sparse_attention


def make_call(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch: int = 1,
    q_len: int = 97,
    k_len: int | None = None,
    heads: int = 2,
    key_heads: int | None = None,
    dim: int = 64,
    block_q: int = 64,
    block_k: int = 64,
    density: float = 0.6,
    list_batch: int = 1,
    list_heads: int = 1,
    full: bool = False,
    orders: bool = False,
    holes: int = 0,
    bias: str = "",
    predicate: Any = "",
) -> Call:
    """A random call; lists may leave rows empty, orders are permutations with `holes` extra slots or more."""
    from dit_accel.kernels.block_sparse import Predicate

    k_len = q_len if k_len is None else k_len
    key_heads = key_heads or heads
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    q_blocks, k_blocks = -(-(q_len + holes) // block_q), -(-(k_len + holes) // block_k)
    if not orders:
        q_blocks, k_blocks = -(-q_len // block_q), -(-k_len // block_k)
    lists = (list_batch, list_heads, q_blocks)
    index = torch.stack([torch.randperm(k_blocks, generator=rng) for _ in range(math.prod(lists))])
    kept = torch.rand((*lists, k_blocks), generator=rng) < density
    call: Call = {
        "q": randn(batch, q_len, heads, dim),
        "k": randn(batch, k_len, key_heads, dim),
        "v": randn(batch, k_len, key_heads, dim),
        "index": index.view(*lists, k_blocks).int(),
        "count": kept.sum(-1).int(),
        "block_q": block_q,
        "block_k": block_k,
    }
    if orders:
        for name, length, slots in (
            ("q_order", q_len, q_blocks * block_q),
            ("k_order", k_len, k_blocks * block_k),
        ):
            tokens = torch.full((list_batch, list_heads, slots), -1)
            for b, h in itertools.product(range(list_batch), range(list_heads)):
                at = torch.arange(length)
                if holes:  # in one run, so that blocks without a hole lie before and behind it
                    at[int(torch.randint(length, (1,), generator=rng)) :] += slots - length
                tokens[b, h, at] = torch.randperm(length, generator=rng)
            call[name] = tokens.int()
    if bias:
        values = torch.randn((batch, 1, k_len), generator=rng) * 2
        if bias == "inf":
            values[torch.rand(values.shape, generator=rng) < 0.3] = -math.inf
        call["key_bias"] = values
    if predicate:
        coords = [torch.randint(0, 12, (3, n), generator=rng).int() for n in (q_len, k_len)]
        call["predicate"] = Predicate(predicate, (7, 6, 5), *coords)
    if full:
        call["full_count"] = full_blocks_first(call)
    return to_device(call, device)


def full_blocks_first(call: Call) -> Tensor:
    """Half of the blocks without holes come first in their lists and are declared full."""
    index, count = call["index"], call["count"]
    declared = torch.zeros_like(count)
    order, block = call.get("k_order"), call["block_k"]
    for b, h, i in itertools.product(*map(range, count.shape)):
        entries = index[b, h, i, : count[b, h, i]].tolist()
        if order is None:
            whole = [e for e in entries if (e + 1) * block <= call["k"].shape[1]]
        else:
            whole = [e for e in entries if (order[b, h, e * block : (e + 1) * block] >= 0).all()]
        chosen = whole[: -(-len(whole) // 2)]
        rest = [e for e in entries if e not in chosen]
        index[b, h, i, : len(entries)] = torch.tensor(chosen + rest, dtype=torch.int32)
        declared[b, h, i] = len(chosen)
    return declared


def to_device(call: Call, device: str) -> Call:
    from dataclasses import replace

    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}
    rule = moved.get("predicate")
    if rule is not None:
        moved["predicate"] = replace(rule, q_coords=rule.q_coords.to(device), k_coords=rule.k_coords.to(device))
    return moved


def pair_mask(call: Call) -> Tensor:
    """Which token pairs attend, [B, H, Sq, Sk], straight from the definition."""
    call = to_device(call, "cpu")
    batch, q_len, heads, _ = call["q"].shape
    k_len = call["k"].shape[1]
    q_blocks, width = call["index"].shape[2:]
    q_order = call.get("q_order", identity(q_len, call["block_q"]))
    k_order = call.get("k_order", identity(k_len, call["block_k"]))
    every = {n: call[n].expand(batch, heads, -1) for n in ("count", "full_count") if n in call}
    index = call["index"].expand(batch, heads, -1, -1)
    q_order, k_order = q_order.expand(batch, heads, -1), k_order.expand(batch, heads, -1)
    mask = torch.zeros(batch, heads, q_len, k_len, dtype=torch.bool)
    for b, h, i in itertools.product(range(batch), range(heads), range(q_blocks)):
        rows = q_order[b, h, i * call["block_q"] : (i + 1) * call["block_q"]].long()
        rows = rows[rows >= 0]
        for entry in range(min(int(every["count"][b, h, i]), width)):
            first = int(index[b, h, i, entry]) * call["block_k"]
            cols = k_order[b, h, first : first + call["block_k"]].long()
            cols = cols[cols >= 0]
            partial = "full_count" not in every or entry >= int(every["full_count"][b, h, i])
            mask[b, h, rows[:, None], cols] = admitted(call, rows, cols) if partial else True
    if "key_bias" in call:
        mask &= (call["key_bias"] != -math.inf).unsqueeze(2)
    return mask


def identity(length: int, block: int) -> Tensor:
    slots = torch.arange(-(-length // block) * block)
    return torch.where(slots < length, slots, -1).view(1, 1, -1)


def admitted(call: Call, rows: Tensor, cols: Tensor) -> Tensor:
    rule = call.get("predicate")
    if rule is None:
        return torch.ones(len(rows), len(cols), dtype=torch.bool)
    d = [(rule.q_coords[a][rows][:, None] - rule.k_coords[a][cols][None]).abs() for a in range(3)]
    r = rule.radius
    if rule.kind == "box":
        return (d[0] <= r[0]) & (d[1] <= r[1]) & (d[2] <= r[2])
    if rule.kind == "disk":
        return (d[0] <= r[0]) & (d[1] ** 2 + d[2] ** 2 <= r[1] ** 2)
    return d[0] <= r[0]


def dense(call: Call, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Masked softmax attention with every step in `dtype`: out [B, Sq, H, D], lse [B, H, Sq]."""
    q, k, v = (call[n].to("cpu", dtype).transpose(1, 2) for n in ("q", "k", "v"))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    logits = q @ k.mT * (call.get("scale") or q.shape[-1] ** -0.5)
    if "key_bias" in call:
        logits = logits + call["key_bias"].to("cpu", dtype).unsqueeze(2)
    logits = logits.masked_fill(~mask, -math.inf)
    weights = torch.softmax(logits, -1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return (weights @ v).transpose(1, 2), torch.logsumexp(logits, -1)


def check(call: Call, out: Tensor, lse: Tensor) -> None:
    """Raise unless the result is within budget: 2 x (eager error in the same precision + eps max|gold|)."""
    q = call["q"]
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.dtype == torch.float32
    mask = pair_mask(call)
    gold_out, gold_lse = dense(call, mask, torch.float64)
    eager_out, eager_lse = dense(call, mask, q.dtype)
    empty = gold_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty), "lse is -inf on other rows"
    within_budget("out", out, gold_out, eager_out)
    within_budget(
        "lse",
        lse.cpu().masked_fill(empty, 0),
        gold_lse.masked_fill(empty, 0),
        eager_lse.masked_fill(empty, 0),
    )
    assert out.cpu().transpose(1, 2)[empty].count_nonzero() == 0, "rows without keys are not zero"


def within_budget(name: str, got: Tensor, gold: Tensor, eager: Tensor) -> None:
    if gold.numel() == 0:
        return
    got, eps = got.cpu().double(), torch.finfo(eager.dtype).eps
    assert got.isfinite().all(), f"{name} is not finite"
    budget = 2 * ((eager.double() - gold).abs().max() + eps * gold.abs().max())
    error = (got - gold).abs().max()
    assert error <= budget, f"{name}: error {error:.3e} over budget {budget:.3e}"
