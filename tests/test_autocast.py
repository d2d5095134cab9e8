"""Under torch.autocast attention runs in autocast's dtype, as torch's own does, and decides with autocast off."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel.errors import NonFiniteError

CPU = torch.device("cpu")
FAMILIES = [tiny.flux, tiny.wan, tiny.sd3, tiny.cogvideox, tiny.qwen_image]
LAYOUT = dit_accel.TokenLayout(grid=(1, 12, 10), text=6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", ["draft", "hilbert-ear"])
def test_a_pipeline_runs_as_stock_does(family: Any, recipe: str) -> None:
    pipe, call = family()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = tiny.generate(pipe, call)
        with dit_accel.accelerate(pipe, recipe, density=0.5, dense_steps=0) as handle:
            out = tiny.generate(pipe, call)
            assert handle.report().sparse_calls > 0
        with dit_accel.accelerate(pipe, recipe, density=1.0):
            assert torch.equal(tiny.generate(pipe, call), stock)
    assert out.dtype == stock.dtype
    assert torch.isfinite(out).all()
    assert not torch.equal(out, stock)


def test_watchers_see_autocasts_dtype_and_autocast_off() -> None:
    pipe, call = tiny.flux()
    seen = []
    with dit_accel.accelerate(pipe, "draft", density=0.5, dense_steps=0) as handle:
        handle.watchers = (
            lambda made, *_: seen.append((made.q.dtype, made.v.dtype, torch.is_autocast_enabled("cpu"))),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tiny.generate(pipe, call, steps=1)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, False)}


@pytest.mark.parametrize("recipe", ["draft", "hilbert-ear", "svg-ear", "agent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_tensors_are_cast_first(recipe: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, LAYOUT.length, 3, 16, generator=g).to(dtype) for _ in range(3))
    lower = [x.bfloat16() for x in (q, k, v)]
    want = dit_accel.attention(*lower, layout=LAYOUT, recipe=recipe, density=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=recipe, density=0.4)
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def test_float64_stays_as_it_is() -> None:
    q = torch.randn(1, LAYOUT.length, 2, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dit_accel.attention(q, q, q, layout=LAYOUT, recipe="draft", density=0.4).dtype == torch.float64


def test_errors_leave_autocast_as_it_was() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", density=0.5), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(NonFiniteError):
            tiny.generate(pipe, call, latents=torch.full_like(tiny.generate(pipe, call, steps=1), torch.nan))
        assert torch.is_autocast_enabled("cpu")
