"""Rounding to int8 restated slowly, block by block, and what it may change of the unrounded answer."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from attention_gold import Call, dense, identity, pair_mask, to_device, within_budget
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """Queries [B, Sq, H, D] and keys [B, Sk, H, D] as int8 gives them back (float64), keys without their mean.

    `lost` [B, H, Sq]: what the logits of each query lost with the mean. `error` [B, H, Sq]: how far a logit of the
    query may lie from that of the unrounded numbers.
    """

    q: Tensor
    k: Tensor
    lost: Tensor
    error: Tensor


def nearest(rows: Tensor) -> tuple[Tensor, float]:
    """Rows on a grid of 127 steps to their largest number, in fp32 as the kernel does it, and half a step."""
    rows = rows.float()
    step = (rows.abs().max() / 127).clamp(min=1e-12)
    levels = torch.floor(rows * (1 / step) + 0.5)
    assert levels.abs().max() <= 127
    return (levels * step).double(), float(step) / 2


def key_mean(call: Call) -> Tensor:
    """The mean of up to 1,024 evenly spaced keys, summed where the call lies: another order may turn a level."""
    k = call["k"]
    return k[:, :: -(-k.shape[1] // 1024)].float().mean(1).cpu()


def rounded(call: Call, mean: Tensor) -> Rounded:
    """Round query by query and key block by key block."""
    q, k, block = call["q"], call["k"], call["block_k"]
    batch, q_len, heads, dim = q.shape
    k_len, group = k.shape[1], heads // k.shape[2]
    scale = call.get("scale") or dim**-0.5
    order = call.get("k_order", identity(k_len, block)).expand(batch, heads, -1)
    bias = call.get("key_bias", torch.zeros(1, 1, k_len)).expand(batch, heads, -1)
    new_q = torch.zeros(q.shape, dtype=torch.float64)
    new_k = torch.zeros(batch, k_len, heads, dim, dtype=torch.float64)
    lost, error = torch.zeros(2, batch, heads, q_len, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        half_k = 0.0
        for first in range(0, order.shape[2], block):
            tokens = order[b, h, first : first + block].long()
            tokens = tokens[tokens >= 0]
            tokens = tokens[bias[b, h, tokens] > -math.inf]
            if len(tokens):
                new_k[b, tokens, h], half = nearest(k[b, tokens, h // group].float() - mean[b, h // group])
                half_k = max(half_k, half)
        largest = new_k[b, :, h].abs().sum(-1).max()
        for i in range(q_len):
            new_q[b, i, h], half_q = nearest(q[b, i, h])
            lost[b, h, i] = scale * q[b, i, h].double() @ mean[b, h // group].double()
            error[b, h, i] = scale * (q[b, i, h].double().abs().sum() * half_k + largest * half_q)
    return Rounded(new_q, new_k, lost, error)


def check_rounded(call: Call, out: Tensor, lse: Tensor) -> float:
    """Raise unless the result is that of the rounded numbers within budget, and near that of the unrounded ones.

    Returns the relative error against the unrounded answer.
    """
    mean, call = key_mean(call), to_device(call, "cpu")
    assert out.dtype == call["q"].dtype
    assert lse.dtype == torch.float32
    out, lse = out.cpu(), lse.cpu()
    new, mask, dtype = rounded(call, mean), pair_mask(call), call["q"].dtype
    values = call["v"].repeat_interleave(new.k.shape[2] // call["v"].shape[2], 2)
    same = {**call, "q": new.q, "k": new.k, "v": values}
    gold, gold_lse = dense(same, mask, torch.float64)
    eager, _ = dense(same, mask, dtype)
    _, eager_lse = dense(same, mask, torch.float32)
    empty = gold_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty), "lse is -inf on other rows"
    within_budget("out", out, gold, eager)
    gold_lse, eager_lse = gold_lse + new.lost, eager_lse + new.lost.float()
    within_budget("lse", lse.masked_fill(empty, 0), gold_lse.masked_fill(empty, 0), eager_lse.masked_fill(empty, 0))
    true, true_lse = dense(call, mask, torch.float64)
    apart = (lse - true_lse).masked_fill(empty, 0).abs()
    assert (apart <= new.error + 1e-4).all(), "lse is farther from the unrounded one than rounding allows"
    return float((out - true).norm() / true.norm().clamp(min=1e-30))
