"""Every recipe on the two trained demo models: odd grids, batch 2, guidance on, density .3."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

import dit_accel

pytestmark = pytest.mark.full
NAMES = [name for name, recipe in dit_accel.recipes().items() if not recipe.adaptive]
PROMPTS = ["taco, noto style", "owl, twemoji style"]
CLIPS = ["a taco sliding left, noto style", "an owl bouncing, twemoji style"]


@lru_cache(maxsize=1)
def pictures() -> tuple[Any, dict[str, Any]]:
    """31 x 27 tokens and text."""
    pipe = FluxPipeline.from_pretrained(dit_accel.demo_model("emoji-flux"))
    call = {"height": 124, "width": 108, "max_sequence_length": 32, "true_cfg_scale": 2.0, "negative_prompt": [""] * 2}
    return pipe, {"prompt": PROMPTS, **call}


@lru_cache(maxsize=1)
def clips() -> tuple[Any, dict[str, Any]]:
    """9 x 9 x 11 tokens."""
    pipe = WanPipeline.from_pretrained(dit_accel.demo_model("emoji-wan"))
    call = {"height": 288, "width": 352, "num_frames": 33, "guidance_scale": 3.0}
    return pipe, {"prompt": CLIPS, **call}


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    rng = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(**call, num_inference_steps=5, generator=rng, output_type="latent", return_dict=False)[0]


@pytest.mark.parametrize("model", [pictures, clips])
@pytest.mark.parametrize("name", NAMES)
def test_it_generates_at_the_density_that_was_asked(name: str, model: Any) -> None:
    pipe, call = model()
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, name, density=0.3, dense_steps=0.2) as handle:
        made = latents(pipe, call)
        report = handle.report()
    why = [note for note in report.notes if "asked density" in note]
    print(name, model.__name__, round(report.density, 3), *why)
    assert torch.isfinite(made).all()
    assert report.sparse_calls > 0
    assert abs(report.density / 0.3 - 1) <= 0.2 or why, report
