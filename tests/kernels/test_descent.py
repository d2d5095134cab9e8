"""The best product on a binary descent: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.descent import descend

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=1, heads=2, groups=3, asking=4, length=75, dim=24, unit=16, dtype=torch.float32):
    """Random queries and keys in units, the last ones of few tokens; more slots than keys."""
    rng = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, groups, asking, dim, generator=rng).to(dtype)
    k = torch.randn(batch, length, heads, dim, generator=rng).to(dtype)
    sizes, left = [], length
    while left:
        sizes.append(min(left, unit if len(sizes) < 2 else int(torch.randint(1, unit + 1, (1,), generator=rng))))
        left -= sizes[-1]
    slots, order = torch.full((len(sizes), unit), -1, dtype=torch.int32), torch.randperm(length, generator=rng).int()
    for row, part in zip(slots, order.split(sizes), strict=True):
        row[: len(part)] = part
    return {"queries": queries, "k": k, "slots": slots.flatten(), "unit": unit}


def slowly(given, dtype):
    """The definition, one group and unit at a time, every step in `dtype`."""
    queries, k, unit = given["queries"].to(dtype), given["k"].to(dtype), given["unit"]
    b, h, groups, _, _ = queries.shape
    units = given["slots"].view(-1, unit).tolist()
    out = torch.empty(b, h, groups, len(units), dtype=dtype)
    for i, j, g, u in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        keys = [t for t in units[u] if t >= 0]
        worth = [float((queries[i, j, g] @ k[i, t, j]).max()) for t in keys]
        low, high, best = 0, len(keys), -math.inf
        for _ in range((unit - 1).bit_length()):
            middle = (low + high) // 2
            left, right = worth[(low + middle) // 2], worth[(middle + high) // 2]
            best = max(best, left, right)
            low, high = (low, middle) if left > right else (middle, high)
        out[i, j, g, u] = best
    return out


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


CASES = {
    "plain": {},
    "one asks, unit of 48": {"asking": 1, "unit": 48, "length": 120},
    "bf16, three ask": {"dtype": torch.bfloat16, "asking": 3, "unit": 32, "dim": 40},
    "fp16, batch": {"dtype": torch.float16, "batch": 2, "heads": 1, "groups": 9, "asking": 16},
    "one token": {"length": 1},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, backend, device):
    given = call(sorted(CASES).index(case), **CASES[case])
    out = descend(**moved(given, device), backend=backend).cpu()
    assert out.dtype == torch.float32
    within_budget("best", out, slowly(given, torch.float64), slowly(given, torch.float32))


@on_both
def test_a_part_of_the_groups_at_a_time(backend, device, monkeypatch):
    given = moved(call(7, groups=7), device)
    whole = descend(**given, backend=backend)
    monkeypatch.setattr(f"dit_accel.kernels.descent.{backend}.BYTES", 1)
    torch.testing.assert_close(descend(**given, backend=backend), whole)


@on_both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_not_finite_and_met_shows(bad, backend, device):
    given = moved(call(9), device)
    out = descend(**given, backend=backend)
    given["queries"][0, 1, 2] = bad
    worse = descend(**given, backend=backend)
    assert not worse[0, 1, 2].isfinite().any()
    assert torch.equal(worse[0, 0], out[0, 0])
    assert torch.equal(worse[0, 1, :2], out[0, 1, :2])


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"queries": torch.zeros(1, 2, 3, 24)}, ValueError, "queries is [1, 2, 3, 24]"),
        ({"k": torch.zeros(1, 75, 2, 24, dtype=torch.float16)}, TypeError, "k torch.float16"),
        ({"unit": 24}, ValueError, "unit is 24"),
        ({"slots": torch.zeros(16)}, ValueError, "slots is [16] torch.float32"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_bad_calls_say_what_was_given(changed, error, words):
    with pytest.raises(error) as told:
        descend(**{**call(0), **changed})
    assert words in str(told.value)
