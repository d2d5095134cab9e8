"""Outputs scaled and moved unit by unit: one table for both back ends."""

from __future__ import annotations

import math
import random

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.blend import blend

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def call(seed, *, batch=1, heads=2, length=45, dim=24, units=7, own=(1, 1), dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    room = torch.full((batch, heads, length + 2, 2 * dim), math.nan)  # strided, with NaN around
    out = room[:, :, 1 : length + 1, ::2].transpose(1, 2).to(dtype)
    out.copy_(torch.randn(out.shape, generator=rng))
    kept, rest = torch.rand(batch, heads, units, generator=rng), torch.randn(batch, heads, units, dim, generator=rng)
    return out, kept, rest, torch.randint(units, (*own, length), generator=rng)


def slowly(out, kept, rest, unit, dtype):
    """Token by token."""
    b, s, h, _ = out.shape
    unit, made = unit.expand(b, h, -1), torch.empty(out.shape, dtype=dtype)
    for i in range(b):
        for j in range(h):
            for t in range(s):
                u = unit[i, j, t]
                made[i, t, j] = out[i, t, j].to(dtype) * kept[i, j, u].to(dtype) + rest[i, j, u].to(dtype)
    return made


def check(given, backend, device):
    made = blend(*(x.to(device) for x in given), backend=backend).cpu()
    assert made.dtype == given[0].dtype
    within_budget("out", made, slowly(*given, torch.float64), slowly(*given, given[0].dtype))


@on_both
def test_random_sweep(backend, device):
    rng = random.Random(3)
    for seed in range(8):
        batch, heads = rng.randint(1, 2), rng.randint(1, 3)
        made = {
            "batch": batch, "heads": heads, "own": (rng.choice((1, batch)), rng.choice((1, heads))),
            "length": rng.randint(1, 170), "dim": rng.choice((16, 40, 64, 128)), "units": rng.randint(1, 9),
            "dtype": rng.choice((torch.bfloat16, torch.float16, torch.float32)),
        }  # fmt: skip
        print(f"seed {seed}: {made}")
        check(call(seed, **made), backend, device)


def test_what_does_not_fit_is_refused():
    out, kept, rest, unit = call(0)
    with pytest.raises(ValueError, match=r"kept \[1, 2, 6\]"):
        blend(out, kept[..., 1:], rest, unit)
    with pytest.raises(ValueError, match=r"unit \[1, 1, 44\]"):
        blend(out, kept, rest, unit[..., 1:])
    with pytest.raises(ValueError, match="known are 'triton', 'reference'"):
        blend(out, kept, rest, unit, backend="cpu")
    with pytest.raises(RuntimeError, match=r"torch\.float64 is not"):
        blend(out.double(), kept, rest, unit, backend="triton")
