"""The error of letting means stand for a unit: one table for both back ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.unit_error import unit_error

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=1, heads=2, rows=5, length=60, dim=24, block=16, units=4, shared=False, dtype=torch.float32):
    """Random units of whole blocks with holes, one of them empty, and slots behind the last that belong to none."""
    rng = torch.Generator().manual_seed(seed)
    queries = torch.randn(batch, heads, rows, dim, generator=rng)
    k, v = (torch.randn(batch, length, heads, dim, generator=rng).to(dtype) for _ in range(2))
    lead = (1, 1) if shared else (batch, heads)
    slots, bounds, taken = [], [], length - 6
    for _ in range(math.prod(lead)):
        cuts = torch.randint(0, taken, (units - 2,), generator=rng).sort().values.tolist()
        parts = torch.randperm(length, generator=rng)[:taken].tensor_split(cuts)
        filled = [torch.cat([part, torch.full((-len(part) % block,), -1)]) for part in (*parts, torch.tensor([]))]
        bounds.append(torch.tensor([0, *(len(part) for part in filled)]).cumsum(0))
        slots.append(torch.cat([*filled, torch.arange(block)]).int())
    longest = max(len(one) for one in slots)
    slots = torch.stack([torch.nn.functional.pad(one, (0, longest - len(one)), value=-1) for one in slots])
    given = {
        "queries": queries, "k": k, "v": v, "block": block, "scale": 0.3,
        "slots": slots.view(*lead, -1), "bounds": torch.stack(bounds).view(*lead, -1),
    }  # fmt: skip
    return {**given, "means_v": means(given, v)}


def units_of(given, sample, head):
    slots, bounds = (given[name] for name in ("slots", "bounds"))
    slots, bounds = (x[min(sample, len(x) - 1)][min(head, x.shape[1] - 1)].tolist() for x in (slots, bounds))
    return [[t for t in slots[a:b] if t >= 0] for a, b in pairwise(bounds)]


def means(given, x):
    b, _, h, d = x.shape
    out = torch.zeros(b, h, given["bounds"].shape[2] - 1, d)
    for i in range(b):
        for j in range(h):
            for u, tokens in enumerate(units_of(given, i, j)):
                if tokens:
                    out[i, j, u] = x[i, tokens, j].float().mean(0)
    return out


def slowly(given, dtype):
    """The definition, one query and unit at a time, every step in `dtype`; queries rounded as Triton rounds them."""
    queries = given["queries"].to(given["k"].dtype).to(dtype) * given["scale"]
    k, v, mean_v = (given[name].to(dtype) for name in ("k", "v", "means_v"))
    mean_k = means(given, given["k"]).to(dtype)
    b, h, rows, _ = queries.shape
    out = torch.zeros(b, h, rows, mean_k.shape[2], dtype=dtype)
    for i, j, r in torch.cartesian_prod(*(torch.arange(n) for n in (b, h, rows))).tolist():
        q, units = queries[i, j, r], units_of(given, i, j)
        top = max(float(k[i, t, j] @ q) for unit in units for t in unit)
        weights = [(k[i, unit, j] @ q - top).exp() for unit in units]
        for u, unit in enumerate(units):
            pooled = len(unit) * (mean_k[i, j, u] @ q - top).exp() * mean_v[i, j, u]
            out[i, j, r, u] = (weights[u] @ v[i, unit, j] - pooled).norm() / sum(w.sum() for w in weights)
    return out


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


CASES = {
    "plain": {},
    "units that all share": {"shared": True, "batch": 2},
    "more units than a program does, more rows": {"units": 19, "rows": 35, "length": 150, "heads": 1},
    "block of 48": {"block": 48, "length": 130},
    "bf16": {"dtype": torch.bfloat16, "dim": 40, "block": 32},
    "bf16, many rows": {"dtype": torch.bfloat16, "rows": 70, "length": 300, "units": 5, "heads": 1},
    "fp16, batch": {"dtype": torch.float16, "batch": 2, "heads": 1},
}


THOUSAND = "more than a thousand units"  # so many that a row is put together in parts
LARGE = {THOUSAND: {"units": 1030, "rows": 1, "length": 1300, "heads": 1, "dim": 16}}


@on_both
@pytest.mark.parametrize("case", [*CASES, pytest.param(THOUSAND, marks=pytest.mark.full)])
def test_matches_the_definition(case, backend, device):
    given = call(sorted({**CASES, **LARGE}).index(case), **{**CASES, **LARGE}[case])
    out = unit_error(**moved(given, device), backend=backend).cpu()
    assert out.dtype == torch.float32
    gold = slowly(given, torch.float64)
    if backend == "reference" and given["k"].dtype != torch.float32:
        gold = slowly({**given, "k": given["k"].float(), "v": given["v"].float()}, torch.float64)
    within_budget("error", out, gold, slowly(given, given["k"].dtype).float())
    assert (out[..., -1] == 0).all()  # the empty unit


@on_both
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("name", "bad"), [("queries", math.nan), ("k", math.nan), ("v", math.inf)])
def test_what_is_not_finite_shows_in_its_head_alone(name, bad, backend, device):
    given = moved(call(9), device)
    out = unit_error(**given, backend=backend)
    token = int(given["slots"][0, 1, 0])
    given[name] = given[name].clone()
    given[name][(0, 1, 2) if name == "queries" else (0, token, 1, 3)] = bad
    worse = unit_error(**given, backend=backend)
    assert not worse[0, 1, 2, 0].isfinite()
    assert torch.equal(worse[0, 0], out[0, 0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"queries": torch.zeros(1, 2, 24)}, "queries is [1, 2, 24]"),
        ({"v": torch.zeros(1, 60, 2, 8)}, "v [1, 60, 2, 8]"),
        ({"slots": torch.zeros(1, 2, 80)}, "slots is [1, 2, 80] torch.float32"),
        ({"block": 24}, "block is 24"),
        ({"scale": -0.3}, "scale is -0.3"),
        ({"means_v": torch.zeros(1, 2, 3, 24)}, "means_v is [1, 2, 3, 24]"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_calls_say_what_was_given(changed, words):
    with pytest.raises(ValueError) as told:
        unit_error(**{**call(0), **changed})
    assert words in str(told.value)
