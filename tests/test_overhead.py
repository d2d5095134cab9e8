"""What acceleration costs where it does nothing: attaching, and dense steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import tiny
import torch
from diffusers import FluxTransformer2DModel

import dit_accel


def test_attaching_to_57_layers_takes_under_50_ms() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=19, num_single_layers=38)
    spans = []
    for _ in range(5):
        start = time.perf_counter()
        handle = dit_accel.accelerate(model, "draft")
        spans.append(time.perf_counter() - start)
        assert len(handle.sites) == 57
        handle.restore()
    assert min(spans) < 0.05, spans


class FluxAttnProcessor:
    """A processor that does nothing, so that only the engine's own time is left; it passes for diffusers' own."""

    __module__ = "diffusers.models.transformers.transformer_flux"
    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden_states


def microseconds(call: Callable[[], Any], repeats: int = 500) -> float:
    """Return the least time of a call over several rounds."""
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats * 1e6)
    return best


def test_dense_steps_cost_at_most_a_hundredth() -> None:
    """A hundredth of a step of 0.18 s over 57 layers is 31 microseconds a layer; slower steps allow more."""
    model = tiny.flux_transformer(double=1, single=1)
    attn = model.single_transformer_blocks[0].attn
    attn.processor = FluxAttnProcessor()
    call = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float(),
    }
    x = torch.randn(1, 24, 32)
    with torch.inference_mode(), dit_accel.accelerate(model, "draft", density=1) as handle:
        handle.step(0, 1)
        handle._attachments[0]._enter(model, (), call)
        layer = microseconds(lambda: attn.processor(attn, x)) - microseconds(lambda: FluxAttnProcessor()(attn, x))
        handle.step(0, 1)
        forward = microseconds(lambda: handle._attachments[0]._enter(model, (), call), repeats=50)
        assert handle.report().sparse_calls == 0
    print(f"{layer:.1f} us a layer, {forward:.1f} us a forward")
    assert layer + forward / 57 < 31


def test_dense_calls_run_the_original_processor_itself() -> None:
    """The stock processor is called with the very arguments; nothing is projected twice."""
    pipe, call = tiny.flux()
    seen = []
    with dit_accel.accelerate(pipe, "draft", density=1):
        stand_in = pipe.transformer.transformer_blocks[0].attn.processor
        original = type(stand_in).__mro__[1]
        patched = original.__call__

        def watch(self: object, *args: object, **kwargs: object) -> object:
            seen.append(type(self))
            return patched(self, *args, **kwargs)

        original.__call__ = watch
        try:
            tiny.generate(pipe, call)
        finally:
            original.__call__ = patched
    assert seen
    assert set(seen) == {original}
