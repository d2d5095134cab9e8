"""diffusers' caches as rivals: they do something, or say why not, and leave nothing behind."""

from __future__ import annotations

import pytest
import tiny
import torch

from dit_accel.errors import UnsupportedError
from dit_accel.eval.rivals import Cache, cached, caches


@pytest.mark.parametrize("make", [tiny.flux, tiny.wan])
def test_taylorseer_and_magcache_change_the_result_and_go_without_a_trace(make):
    pipe, call = make()
    stock = tiny.generate(pipe, call, steps=6)
    found = [c for c in caches(6, 0.2, lambda: [1.0] * 6) if not c.name.startswith("first-block")]
    assert len(found) == 4
    for cache in found:
        with cached(pipe.transformer, cache):
            assert not torch.equal(tiny.generate(pipe, call, steps=6), stock), cache.name
        assert torch.equal(tiny.generate(pipe, call, steps=6), stock), cache.name


def test_a_cache_that_touches_nothing_is_refused():
    from diffusers.hooks import TaylorSeerCacheConfig

    pipe, _ = tiny.flux()
    idle = Cache("idle", {}, lambda: TaylorSeerCacheConfig(cache_identifiers=["nowhere"]))
    with (
        pytest.raises(UnsupportedError, match="does not take idle: it changes no module"),
        cached(pipe.transformer, idle),
    ):
        pass
