"""Queries and keys rounded to int8: what that means, in plain torch, and how back ends without int8 products run it.

With m any vector, q·k = q·(k - m) + q·m, and the last term is the same for every key of a query: the softmax does not
see it, only the log-sum-exp does. So keys lose (roughly) their mean, which is what makes their numbers large, and the
log-sum-exp gets scale q·m back, exact up to fp32. Of what is left,

    q ≈ a[query] · q8,  a = max|q| / 127 over the query's head dim
    k - m ≈ b[block] · k8,  b = max|k - m| / 127 over the keys of a block and their head dim

with q8, k8 the nearest integers in -127..127. The products q8·k8 are sums of integers, so they are exact.
After SageAttention (Zhang et al. 2024, arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem
from .reference import block_tokens

SAMPLE = 1024  # keys that the vector m is the mean of; it need not be the true mean
LEAST_STEP = 1e-12  # of a grid for numbers that are all zero; its products with scale and -inf must keep their sign
LEVELS = 127


def on_rounded(problem: Problem, run: Callable[[Problem], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Run a back end on the rounded queries and keys, in fp32 (fp64 for fp64 inputs).

    A number that is not finite makes the step of its query, or of its key's block, NaN, and so what is computed with
    it; a key that a bias of -inf masks has no part in that, nor has one in no block.
    """
    rounded, lost = rounded_problem(problem)
    out, lse = run(rounded)
    lse = torch.where(lse == -math.inf, lse, lse + lost)  # no key stays no key, also where q is not finite
    return out.to(problem.q.dtype), lse


def rounded_problem(problem: Problem) -> tuple[Problem, Tensor]:
    """The same call on q and k as int8 gives them back, and what the log-sum-exps lost, [B, H, Sq]."""
    q, k, v = problem.q, problem.k, problem.v
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    mean = key_mean(k)
    per_query_head = mean.repeat_interleave(q.shape[2] // k.shape[2], 1)  # [B, H, D]
    lost = torch.einsum("bshd,bhd->bhs", q.to(compute), per_query_head.to(compute)) * problem.scale
    keys = quantised_keys(problem, mean)
    values = v.repeat_interleave(keys.shape[2] // v.shape[2], 2).to(compute)
    rounded = replace(problem, q=_quantised_queries(q.to(compute)), k=keys.to(compute), v=values)
    return rounded, lost.float()


def key_mean(k: Tensor) -> Tensor:
    """The vector that the keys of each sample and head lose, float32 [B, Hk, D]: the mean of evenly spaced ones.

    What is not finite counts as zero, so that a bad key cannot spoil queries that never meet it.
    """
    stride = -(-k.shape[1] // SAMPLE)
    return k[:, ::stride].float().nan_to_num_(0.0, 0.0, 0.0).mean(1)


def packed_heads(problem: Problem) -> int:
    """Heads of the rounded keys: the keys' own, or the queries' where their blocks or masks differ among those."""
    k_order, bias = problem.k_order, problem.key_bias
    by_query_head = any(x is not None and x.shape[1] > 1 for x in (k_order, bias))
    return problem.q.shape[2] if by_query_head else problem.k.shape[2]


def _step(largest: Tensor) -> Tensor:
    """Of a grid that reaches the largest number; on CUDA torch divides by a plain number only roughly."""
    return (largest / torch.full_like(largest, LEVELS)).clamp(min=LEAST_STEP)


def _quantised_queries(q: Tensor) -> Tensor:
    finite = q.isfinite()
    known = q.masked_fill(~finite, 0.0)
    step = _step(known.abs().amax(-1, keepdim=True))
    levels = torch.floor(known * (1 / step) + 0.5)
    return levels * step.masked_fill(~finite.all(-1, keepdim=True), math.nan)


def quantised_keys(problem: Problem, mean: Tensor) -> Tensor:
    """Keys without `mean` as int8 gives them back, float32 [B, Sk, packed heads, D]; in no block, or masked: zero."""
    k, heads = problem.k, packed_heads(problem)
    batch, length, own, dim = k.shape
    blocks = -(-length // problem.block_k) if problem.k_order is None else problem.k_order.shape[2] // problem.block_k
    tokens = block_tokens(problem.k_order, blocks, problem.block_k, length, k.device)
    tokens = tokens.expand(batch, heads, -1, -1).flatten(2)  # [B, heads, slots]
    hidden = tokens < 0
    place = tokens.clamp(min=0)
    if problem.key_bias is not None:
        hidden = hidden | (problem.key_bias.expand(batch, heads, -1).gather(2, place) == -math.inf)
    centred = (k.float() - mean[:, None]).repeat_interleave(heads // own, 2).transpose(1, 2)
    rows = centred.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, dim)).masked_fill(hidden.unsqueeze(-1), 0.0)
    rows = rows.unflatten(2, (blocks, problem.block_k))
    finite = rows.isfinite()
    rows = rows.masked_fill(~finite, 0.0)
    step = _step(rows.abs().amax((-1, -2), keepdim=True))
    levels = torch.floor(rows * (1 / step) + 0.5)
    back = (levels * step.masked_fill(~finite.all(-1).all(-1)[..., None, None], math.nan)).flatten(2, 3)
    out = back.new_zeros(batch, heads, length + 1, dim)
    out.scatter_(2, torch.where(tokens < 0, length, tokens).unsqueeze(-1).expand_as(back), back)
    return out[:, :, :-1].transpose(1, 2)
