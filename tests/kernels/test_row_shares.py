"""The softmax of rows added up by unit and by key: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.row_shares import key_shares, unit_shares

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, rows=3, columns=37, heads=2, batch=1, unit=4, slotted=True, bias=None):
    """Random logits; some columns lie in no slot, some slots hold none."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, heads, rows, columns, generator=rng) * 9
    slots = None
    if slotted:
        full = -(-(columns + 7) // unit) * unit
        slots = torch.full((full,), -1, dtype=torch.int32)
        taken = max(1, columns - 3)
        slots[torch.randperm(full, generator=rng)[:taken]] = torch.randperm(columns, generator=rng)[:taken].int()
    made = None if bias is None else torch.randn(*bias, columns, generator=rng)
    if made is not None:
        made[..., 1::5] = -math.inf
    return {"logits": logits, "slots": slots, "unit": unit, "scale": 0.3, "bias": made}


def shares(given, dtype):
    logits = given["logits"].to(dtype) * given["scale"]
    if given["bias"] is not None:
        logits = logits + given["bias"].to(dtype)[:, :, None]
    return logits.softmax(-1)


def slowly(given, dtype):
    """The definition, unit by unit, every step in `dtype`."""
    share = shares(given, dtype)
    slots = range(share.shape[3]) if given["slots"] is None else given["slots"].tolist()
    units = [slots[i : i + given["unit"]] for i in range(0, len(slots), given["unit"])]
    return torch.stack([share[..., [c for c in unit if c >= 0]].sum(-1) for unit in units], -1)


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


CASES = {
    "plain": {},
    "as they lie": {"slotted": False, "columns": 40, "unit": 8},
    "unit of three, several tiles": {"unit": 3, "columns": 1100, "rows": 1, "batch": 2},
    "bias": {"bias": (1, 1)},
    "bias by sample and head": {"bias": (2, 2), "batch": 2},
    "one column": {"columns": 1, "unit": 1},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_matches_the_definition(case, backend, device):
    given = call(sorted(CASES).index(case), **CASES[case])
    sent = moved(given, device)
    out = unit_shares(**sent, backend=backend)
    assert out.dtype == torch.float32
    within_budget("units", out.cpu(), slowly(given, torch.float64), slowly(given, torch.float32))
    by_key = key_shares(sent["logits"], 0.3, sent["bias"], backend=backend)
    within_budget("keys", by_key.cpu(), *(shares(given, dtype).sum(2) for dtype in (torch.float64, torch.float32)))


@on_both
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row_and_head(bad, backend, device):
    given = moved(call(9), device)
    out, keys = unit_shares(**given, backend=backend), key_shares(given["logits"], 0.3, backend=backend)
    given["logits"][0, 1, 2, 5] = bad
    worse, worse_keys = unit_shares(**given, backend=backend), key_shares(given["logits"], 0.3, backend=backend)
    filled = (given["slots"].view(-1, 4) >= 0).any(-1)
    assert worse[0, 1, 2, filled].isnan().all()
    assert worse_keys[0, 1].isnan().all()
    assert torch.equal(worse[0, 1, :2], out[0, 1, :2])
    assert torch.equal(worse[0, 0], out[0, 0])
    assert torch.equal(worse_keys[0, 0], keys[0, 0])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits is [2, 3, 4]"),
        ({"unit": 5}, "unit is 5; expected to divide 44 slots"),
        ({"slots": torch.zeros(44)}, "slots is [44] torch.float32"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"bias": torch.zeros(1, 2, 5)}, "bias is [1, 2, 5] torch.float32"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_bad_calls_say_what_was_given(changed, words):
    with pytest.raises(ValueError) as told:
        unit_shares(**{**call(0), **changed})
    assert words in str(told.value)
