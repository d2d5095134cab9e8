"""Means of units through an order: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.unit_means import unit_means, unit_means_of_two

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=2, heads=3, length=97, dim=40, unit=None, lists=(1, 1), holes=30, dtype=torch.float32):
    """Random tokens, an order with holes (first in one unit of two), and bounds: equal units, or ragged ones."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, heads, dim, generator=rng).to(dtype)
    slots = torch.full((*lists, length + holes), -1, dtype=torch.int32)
    for b in range(lists[0]):
        for h in range(lists[1]):
            where = torch.randperm(length + holes, generator=rng)[:length]
            slots[b, h, where] = torch.randperm(length, generator=rng).int()
    if unit:
        return x, slots, unit
    inner = torch.randint(0, length + holes + 1, (*lists, 9), generator=rng).sort(-1).values
    inner[..., 4] = inner[..., 3]  # a unit without slots
    ends = torch.full((*lists, 1), length + holes)
    return x, slots, torch.cat([0 * ends, inner, ends], -1)


def slowly(x, slots, bounds, dtype, centre=None, form="plain"):
    """The definition, token by token."""
    batch, _, heads, dim = x.shape
    if isinstance(bounds, int):
        edges = [*range(0, slots.shape[-1], bounds), slots.shape[-1]]
        bounds = torch.tensor(edges).expand(1, 1, -1)
    slots, bounds = slots.cpu().expand(batch, heads, -1), bounds.cpu().expand(batch, heads, -1)
    out = torch.zeros(batch, heads, bounds.shape[-1] - 1, dim, dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            for u, (first, last) in enumerate(bounds[b, h].unfold(0, 2, 1).tolist()):
                tokens = [t for t in slots[b, h, first:last].tolist() if t >= 0]
                for token in tokens:
                    value = x[b, token, h].cpu().to(dtype)
                    if centre is not None:
                        value = value - centre.expand(batch, heads, out.shape[2], dim)[b, h, u].to(dtype)
                    if form == "direction":
                        value = value / max(float(value.norm()), 1e-12)
                    out[b, h, u] += value.abs() if form == "apart" else value
                out[b, h, u] /= max(len(tokens), 1)
    return out


def check(x, slots, bounds, backend, device):
    moved = bounds if isinstance(bounds, int) else bounds.to(device)
    out = unit_means(x.to(device), slots.to(device), moved, backend=backend)
    gold, eager = (slowly(x, slots, bounds, dtype) for dtype in (torch.float64, torch.float32))
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert out.shape == gold.shape
    within_budget("mean", out, gold, eager)


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unit", [None, 16, 48, 200])
@pytest.mark.parametrize("lists", [(1, 1), (2, 3), (1, 3), (2, 1)])
def test_matches_gold(lists, unit, dtype, backend, device):
    check(*call(7, lists=lists, unit=unit, dtype=dtype), backend, device)


@on_both
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_and_strides(seed, backend, device):
    rng = torch.Generator().manual_seed(100 + seed)
    length, dim, batch, heads = (int(torch.randint(1, n, (1,), generator=rng)) for n in (300, 130, 3, 5))
    unit = int(torch.randint(1, 90, (1,), generator=rng)) if seed % 2 else None
    lists = ((1, 1), (batch, heads))[seed % 3 == 0]
    holes = int(torch.randint(0, 200, (1,), generator=rng))
    print("seed", seed, length, dim, batch, heads, unit, lists, holes)
    x, slots, bounds = call(seed, batch=batch, heads=heads, length=length, dim=dim, unit=unit, lists=lists, holes=holes)
    laid = (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., ::2])
    strided = laid[seed % 4]
    check(strided, slots, bounds, backend, device)


@on_both
@pytest.mark.parametrize("units", ["one centre", "a centre each"])
@pytest.mark.parametrize("form", ["plain", "direction", "apart"])
@pytest.mark.parametrize("unit", [None, 16])
def test_other_forms_of_tokens(unit, form, units, backend, device):
    x, slots, bounds = call(11, unit=unit, lists=(2, 3), dtype=torch.bfloat16, dim=24)
    x[:, 5] = 0  # no direction
    count = slots.shape[-1] // 16 + 1 if unit else bounds.shape[-1] - 1
    centre = torch.randn(2, 3, count, 24) if units == "a centre each" else torch.randn(2, 1, 1, 24)
    centre = None if form == "direction" and unit else centre
    moved = bounds if unit else bounds.to(device)
    given = None if centre is None else centre.to(device)
    out = unit_means(x.to(device), slots.to(device), moved, centre=given, form=form, backend=backend)
    gold, eager = (slowly(x, slots, bounds, dtype, centre, form) for dtype in (torch.float64, torch.float32))
    within_budget("mean", out, gold, eager)


@on_both
@pytest.mark.parametrize("unit", [None, 16])
def test_two_tensors_are_each_for_itself(unit, backend, device):
    x, slots, bounds = call(12, unit=unit)
    x, slots, bounds = x.to(device), slots.to(device), bounds if unit else bounds.to(device)
    y = (x + 1).transpose(1, 2).contiguous().transpose(1, 2)  # lies otherwise
    both = unit_means_of_two(x, y, slots, bounds, backend=backend)
    for one, got in zip((x, y), both, strict=True):
        alone = unit_means(one, slots, bounds, backend=backend)
        if backend == "triton":
            assert torch.equal(got, alone)
        else:  # torch adds in no fixed order on a GPU
            torch.testing.assert_close(got, alone)
    with pytest.raises(ValueError, match="expected them alike"):
        unit_means_of_two(x, y[:, :-1], slots, bounds, backend=backend)


@on_both
@pytest.mark.parametrize("unit", [None, 16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_unit(bad, unit, backend, device):
    """Token 0 is what a careless gather reads for a hole."""
    x, slots, bounds = call(3, unit=unit, lists=(2, 3))
    clean = slowly(x, slots, bounds, torch.float64)
    x[:, 0, 1] = bad
    expected = slowly(x, slots, bounds, torch.float64)
    moved = bounds if unit else bounds.to(device)
    out = unit_means(x.to(device), slots.to(device), moved, backend=backend).cpu()
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert 0 < (~out.isfinite()).any(-1).sum() < out[..., 0].numel() / 2
    assert (out - clean)[out.isfinite()].abs().max() < 1e-6


@on_both
def test_nothing_to_average(backend, device):
    x, slots, _ = call(1)
    empty = unit_means(x.to(device), torch.full_like(slots, -1).to(device), 16, backend=backend)
    assert not empty.any()
    none = unit_means(x[:0].to(device), slots.to(device), 16, backend=backend)
    assert none.shape == (0, 3, 8, 40)
    outside = torch.tensor([[[20, 30]]], device=device)  # slots before and behind belong to no unit
    out = unit_means(x.to(device), slots.to(device), outside, backend=backend)
    within_budget("mean", out, *(slowly(x, slots, outside, dtype) for dtype in (torch.float64, torch.float32)))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "expected [B, S, H, D]"),
        ({"x": torch.zeros(2, 97, 3, 4, dtype=torch.int32)}, TypeError, "torch.int32; expected a floating"),
        ({"slots": torch.zeros(2, 2, 16, dtype=torch.int32)}, ValueError, "slots is [2, 2, 16]; expected [2|1, 3|1"),
        ({"slots": torch.zeros(1, 1, 16, dtype=torch.int64)}, TypeError, "slots is torch.int64"),
        ({"bounds": torch.zeros(1, 1, 3)}, TypeError, "bounds is torch.float32"),
        ({"bounds": torch.zeros(3, dtype=torch.int32)}, ValueError, "bounds is [3]"),
        ({"bounds": 0}, ValueError, "bounds is 0"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
        ({"form": "length"}, ValueError, "form is 'length'"),
        ({"centre": torch.zeros(2, 3, 5, 4)}, ValueError, "centre is [2, 3, 5, 4]"),
        ({"x": torch.zeros(2, 97, 3, 4, requires_grad=True)}, RuntimeError, "no backward pass"),
        ({"x": torch.zeros(2, 97, 3, 4, dtype=torch.float64), "backend": "triton"}, RuntimeError, "torch.float64 is"),
        ({"x": torch.zeros(2, 97, 3, 300), "backend": "triton"}, RuntimeError, "head dim 300"),
    ],
)
def test_bad_calls_say_what_was_given(changed, error, words):
    x, slots, bounds = call(0, unit=16)
    given = {"x": x, "slots": slots, "bounds": bounds, "backend": "reference", **changed}
    with pytest.raises(error) as told:
        unit_means(**given)
    assert words in str(told.value)
