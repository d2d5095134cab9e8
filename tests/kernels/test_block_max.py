"""The largest product of two units: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget
from test_block_mass import call, moved

from dit_accel.kernels.block_max import block_max

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def slowly(given, dtype):
    """The definition, token by token, every step in `dtype`."""
    q, k, unit = given["q"].to(dtype), given["k"].to(dtype), given["unit"]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * given["scale"]
    if "q_bias" in given:
        logits = logits + given["q_bias"].to(dtype)[..., None] + given["k_bias"].to(dtype)[:, :, None]
    q_units, k_units = (given[name].view(-1, unit).tolist() for name in ("q_slots", "k_slots"))
    out = torch.full((*logits.shape[:2], len(q_units), len(k_units)), -math.inf, dtype=dtype)
    for i, queries in enumerate(q_units):
        for j, keys in enumerate(k_units):
            pairs = logits[:, :, [t for t in queries if t >= 0]][..., [t for t in keys if t >= 0]]
            if pairs.numel():
                out[:, :, i, j] = pairs.amax((-1, -2))
    return out


CASES = {
    "plain": {},
    "two tiles a unit": {"unit": 48, "length": 90},
    "bf16": {"dtype": torch.bfloat16, "unit": 32, "dim": 40},
    "fp16, batch": {"dtype": torch.float16, "batch": 2, "heads": 1},
    "biased": {"batch": 2, "biased": True, "dtype": torch.bfloat16},
    "one token": {"length": 1, "text": 0, "holes": 0},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, backend, device):
    asked = dict(CASES[case])
    biased = asked.pop("biased", False)
    given = call(sorted(CASES).index(case), **asked)
    if biased:
        given |= zip(("q_bias", "k_bias"), torch.randn(2, 2, 2, 43) * 5, strict=True)
    out = block_max(**moved(given, device), backend=backend).cpu()
    assert out.dtype == torch.float32
    gold, eager = slowly(given, torch.float64), slowly(given, given["q"].dtype).float()
    empty = gold == -math.inf
    assert torch.equal(out == -math.inf, empty)
    within_budget("largest", *(x.masked_fill(empty, 0) for x in (out, gold, eager)))


@on_both
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_unit(bad, backend, device):
    given = call(9, dim=16)
    for name in ("q", "k"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    out = block_max(**moved(given, device), backend=backend).cpu()
    given["k"][0, 3, 1] = bad
    worse = block_max(**moved(given, device), backend=backend).cpu()
    units = (given["k_slots"].view(-1, 16) == 3).any(-1)
    asked = (given["q_slots"].view(-1, 16) >= 0).any(-1)
    assert not worse[0, 1][asked][:, units].isfinite().any()
    assert torch.equal(worse[0, 1, :, ~units], out[0, 1, :, ~units])
    assert torch.equal(worse[0, 0], out[0, 0])


def test_bad_calls_say_what_was_given():
    given = {name: x for name, x in call(0).items() if name != "unit"}
    with pytest.raises(ValueError, match="unit is 24"):
        block_max(**given, unit=24)
    with pytest.raises(ValueError, match=r"scale is -0\.3"):
        block_max(**{**given, "scale": -0.3}, unit=16)
    with pytest.raises(ValueError, match=r"q_bias and k_bias are \[1, 2, 5\] torch.float32, None"):
        block_max(**given, unit=16, q_bias=torch.zeros(1, 2, 5))
