"""Pooled attention: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.pooled import pooled_attention

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=1, heads=2, length=37, groups=9, rows=4, dim=24, shared=False, dtype=torch.float32):
    """Random means, some groups without tokens, some queries that may see none."""
    rng = torch.Generator().manual_seed(seed)
    lead = (1, 1) if shared else (batch, heads)
    tokens = torch.randint(0, 5, (*lead, groups), generator=rng)
    tokens[..., 0] = 3
    allowed = torch.rand(*lead, rows, groups, generator=rng) < 0.6
    allowed[:, :, 0], allowed[:, :, 1:, 0] = False, True
    k, v = (torch.randn(batch, heads, groups, dim, generator=rng).to(dtype).float() for _ in range(2))
    return {
        "q": torch.randn(batch, heads, length, dim, generator=rng).to(dtype).transpose(1, 2), "k": k, "v": v,
        "tokens": tokens, "allowed": allowed, "row": torch.randint(0, rows, (*lead, length), generator=rng),
        "scale": 0.3,
    }  # fmt: skip


def slowly(given, dtype):
    """The definition with a map of all pairs, every step in `dtype`; no group seen: out 0 and lse -inf."""
    q, k, v = (given[name].to(dtype) for name in ("q", "k", "v"))
    b, s, h, _ = q.shape
    row = given["row"].expand(b, h, s)[..., None].expand(-1, -1, -1, k.shape[2])
    seen = given["allowed"].expand(b, h, -1, -1).gather(2, row)
    weigh = given["tokens"].expand(b, h, -1).to(dtype).log()[:, :, None]
    logits = (torch.einsum("bshd,bhcd->bhsc", q, k) * given["scale"] + weigh).masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).nan_to_num(0)
    return torch.einsum("bhsc,bhcd->bshd", weights, v), lse


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


CASES = {
    "plain": {},
    "several tiles": {"length": 70, "groups": 70, "heads": 1},
    "rows that all share": {"shared": True, "batch": 2},
    "bf16": {"dtype": torch.bfloat16, "dim": 40},
    "fp16, batch": {"dtype": torch.float16, "batch": 2, "heads": 1},
    "one query, one group": {"length": 1, "groups": 1},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, backend, device):
    given = call(sorted(CASES).index(case), **CASES[case])
    made = pooled_attention(**moved(given, device), backend=backend)
    assert (made[0].dtype, made[1].dtype) == (given["q"].dtype, torch.float32)
    for name, got, gold, eager in zip(
        ("out", "lse"), made, slowly(given, torch.float64), slowly(given, given["q"].dtype), strict=True
    ):
        none = gold == -math.inf
        assert torch.equal(got.cpu() == -math.inf, none)
        within_budget(name, *(x.cpu().masked_fill(none, 0) for x in (got, gold, eager)))


@on_both
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_nan_stays_in_the_head_and_among_those_who_see_it(backend, device):
    given = moved(call(9), device)
    out, _ = pooled_attention(**given, backend=backend)
    given["k"] = given["k"].clone()
    given["k"][0, 1, 0] = math.nan
    worse, _ = pooled_attention(**given, backend=backend)
    sees = given["allowed"][0, 1, :, 0][given["row"][0, 1]]
    assert worse[0, sees, 1].isnan().all()
    assert torch.equal(worse[0, ~sees, 1], out[0, ~sees, 1])
    assert torch.equal(worse[0, :, 0], out[0, :, 0])


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        pooled_attention(**call(0), backend="cuda")
