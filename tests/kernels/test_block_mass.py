"""Exact attention added up over units: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.block_mass import block_mass, block_mass_and_lse

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=1, heads=2, length=43, dim=24, unit=16, dtype=torch.float32, bias=None, text=5, holes=20):
    """Random queries and keys; the units of queries leave out the last tokens, which only answer."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, dim, generator=rng).to(dtype) for _ in range(2))

    def slots(tokens):
        full = -(-(tokens + holes) // unit) * unit
        made = torch.full((full,), -1, dtype=torch.int32)
        made[torch.randperm(full, generator=rng)[:tokens].sort().values] = torch.randperm(tokens, generator=rng).int()
        return made

    given = {"q": q, "k": k, "q_slots": slots(length - text), "k_slots": slots(length), "unit": unit, "scale": 0.3}
    if bias:
        given["key_bias"] = torch.randn(*bias, length, generator=rng)
        given["key_bias"][..., ::4] = -math.inf
    return given


def slowly(given, dtype):
    """The definition, token by token, every step in `dtype`."""
    q, k, unit = given["q"].to(dtype), given["k"].to(dtype), given["unit"]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * given["scale"]
    if "key_bias" in given:
        logits = logits + given["key_bias"].to(dtype)[:, :, None]
    seen = [t for t in given["k_slots"].tolist() if t >= 0]
    weights = torch.zeros_like(logits)
    weights[..., seen] = logits[..., seen].softmax(-1)
    q_units, k_units = (given[name].view(-1, unit).tolist() for name in ("q_slots", "k_slots"))
    out = torch.zeros(*weights.shape[:2], len(q_units), len(k_units), dtype=dtype)
    for i, queries in enumerate(q_units):
        rows = [t for t in queries if t >= 0]
        for j, keys in enumerate(k_units):
            columns = [t for t in keys if t >= 0]
            if rows and columns:
                out[:, :, i, j] = weights[:, :, rows][..., columns].sum(-1).mean(-1)
    return out


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


CASES = {
    "plain": {},
    "two tiles a unit": {"unit": 48, "length": 90},
    "bf16": {"dtype": torch.bfloat16, "unit": 32, "dim": 40},
    "fp16, batch": {"dtype": torch.float16, "batch": 2, "heads": 1},
    "bias": {"bias": (1, 1)},
    "bias by sample and head": {"bias": (2, 2), "batch": 2, "length": 30},
    "one token": {"length": 1, "text": 0, "holes": 0},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, backend, device):
    given = call(sorted(CASES).index(case), **CASES[case])
    out = block_mass(**moved(given, device), backend=backend)
    assert out.dtype == torch.float32
    gold, eager = slowly(given, torch.float64), slowly(given, given["q"].dtype).float()
    within_budget("mass", out, gold, eager)


@on_both
def test_log_sum_exps_are_found_and_taken_over(backend, device):
    given = moved(call(4, bias=(1, 1)), device)
    out, lse = block_mass_and_lse(**given, backend=backend)
    torch.testing.assert_close(out, block_mass(**given, backend=backend), rtol=1e-5, atol=1e-6)
    seen = given["k_slots"][given["k_slots"] >= 0].long()
    logits = torch.einsum("bqhd,bkhd->bhqk", given["q"].double(), given["k"][:, seen].double()) * given["scale"]
    gold = (logits + given["key_bias"][..., seen].double()[:, :, None]).logsumexp(-1)
    asks = given["q_slots"] >= 0
    torch.testing.assert_close(lse[..., asks].double(), gold[..., given["q_slots"][asks].long()], rtol=1e-5, atol=1e-5)
    later, same = block_mass_and_lse(**given, lse=lse + 1, backend=backend)  # sums over a larger whole
    torch.testing.assert_close(later, out / math.e, rtol=1e-5, atol=1e-6)
    assert torch.equal(same, lse + 1)
    with pytest.raises(ValueError, match="lse is"):
        block_mass_and_lse(**given, lse=lse[..., 1:], backend=backend)


@on_both
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # a query without a key is NaN
def test_strides_and_what_is_not_finite(backend, device):
    given = call(9, dim=16)
    for name in ("q", "k"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    out = block_mass(**moved(given, device), backend=backend).cpu()
    given["q"][0, 3, 1] = math.nan
    bad = block_mass(**moved(given, device), backend=backend).cpu()
    units = (given["q_slots"].view(-1, 16) == 3).any(-1)
    assert bad[0, 1, units].isnan().all()
    assert torch.equal(bad[0, 1, ~units], out[0, 1, ~units])
    assert torch.equal(bad[0, 0], out[0, 0])
    given["key_bias"] = torch.full((1, 1, 43), -math.inf)
    held = (given["q_slots"].view(-1, 16) >= 0).any(-1)
    assert block_mass(**moved(given, device), backend=backend).cpu()[:, :, held].isnan().all()


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"k": torch.zeros(1, 42, 2, 24)}, ValueError, "k [1, 42, 2, 24]"),
        ({"k": torch.zeros(1, 43, 2, 24).half()}, TypeError, "k torch.float16"),
        ({"unit": 24}, ValueError, "unit is 24"),
        ({"q_slots": torch.zeros(30, dtype=torch.int32)}, ValueError, "q_slots is [30]"),
        ({"k_slots": torch.zeros(32)}, ValueError, "k_slots is [32] torch.float32"),
        ({"key_bias": torch.zeros(43)}, ValueError, "key_bias is [43]"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
        ({"q": torch.zeros(1, 43, 2, 24, requires_grad=True)}, RuntimeError, "no backward pass"),
    ],
)
def test_bad_calls_say_what_was_given(changed, error, words):
    with pytest.raises(error) as told:
        block_mass(**{**call(0), "backend": "reference", **changed})
    assert words in str(told.value)
