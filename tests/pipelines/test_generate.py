"""One picture through a pipeline: its settings are kept, its state put back, and NaN never becomes a file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline

from dit_accel.errors import ConfigError, NonFiniteError
from dit_accel.pipelines.arguments import call_arguments, playing_speed
from dit_accel.pipelines.generate import generate, generate_stock
from dit_accel.pipelines.settings import Defaults, Settings, model_defaults
from dit_accel.planning.sizes import size_unit

SMALL = Settings(steps=2, height=64, width=64, text_length=16, seed=5)


def processors(pipe: FluxPipeline) -> dict[str, type]:
    return {name: type(processor) for name, processor in pipe.transformer.attn_processors.items()}


def hooks(pipe: FluxPipeline) -> int:
    return len(pipe.transformer._forward_hooks) + len(pipe.transformer._forward_pre_hooks)


def test_stock_run_is_what_the_pipeline_draws(pipe: FluxPipeline) -> None:
    made = generate_stock(pipe, "a cat", settings=SMALL)
    noise = torch.Generator().manual_seed(5)
    stock = pipe("a cat", height=64, width=64, num_inference_steps=2, max_sequence_length=16, generator=noise).images[0]
    assert made.image.tobytes() == stock.tobytes()
    assert made.seconds > 0


def test_a_batch_is_drawn_from_seeds_in_turn(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the same pictures as one by one, but for rounding: the order of sums is another."""
    alone = [
        np.asarray(generate_stock(pipe, "a cat", settings=SMALL.model_copy(update={"seed": seed})).image, dtype=int)
        for seed in (5, 6, 7)
    ]
    drawn: list[np.ndarray] = []
    call = type(pipe).__call__

    def watched(self: Any, **arguments: Any) -> Any:
        made = call(self, **arguments)
        drawn.append(made.images)
        return made

    monkeypatch.setattr(type(pipe), "__call__", functools.wraps(call)(watched))
    made = generate_stock(pipe, "a cat", settings=SMALL, batch=3, warm_up=True)
    assert [len(images) for images in drawn] == [3, 3]  # the untimed run, too
    assert made.settings["seed"] == 5
    for image, gold in zip((drawn[1] * 255).round(), alone, strict=True):
        assert np.abs(image - gold).max() <= 1
    assert np.abs(np.asarray(made.image, dtype=int) - alone[0]).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 10


def test_a_pipeline_without_a_number_of_pictures_makes_no_batch() -> None:
    class OneByOne:
        vae_scale_factor = 8

        def __call__(self, prompt: str, num_inference_steps: int = 1, generator: Any = None) -> None: ...

    assert call_arguments(OneByOne(), "a cat", Settings())["prompt"] == "a cat"
    with pytest.raises(ConfigError, match="batch: OneByOne makes one of a prompt at a time"):
        call_arguments(OneByOne(), "a cat", Settings(), batch=2)


def test_warm_up_changes_nothing_but_the_time(pipe: FluxPipeline) -> None:
    cold = generate(pipe, "a cat", recipe="draft", overrides={"density": 0.5}, settings=SMALL)
    warm = generate(pipe, "a cat", recipe="draft", overrides={"density": 0.5}, settings=SMALL, warm_up=True)
    assert warm.image.tobytes() == cold.image.tobytes()
    assert warm.report == cold.report


def test_accelerated_run_differs_and_the_pipeline_is_stock_again(pipe: FluxPipeline) -> None:
    before = processors(pipe), hooks(pipe)
    stock = generate_stock(pipe, "a cat", settings=SMALL)
    made = generate(pipe, "a cat", recipe="draft", overrides={"density": 0.5}, settings=SMALL)
    assert made.report.sparse_calls > 0
    assert made.image.tobytes() != stock.image.tobytes()
    assert (processors(pipe), hooks(pipe)) == before
    assert generate_stock(pipe, "a cat", settings=SMALL).image.tobytes() == stock.image.tobytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_pipeline_is_stock_again_after_a_run_that_broke_off(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = processors(pipe), hooks(pipe)
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise error

        patch.setattr(pipe.scheduler, "step", fail)
        with pytest.raises(error):
            generate(pipe, "a cat", recipe="draft", overrides={"density": 0.5}, settings=SMALL)
    assert (processors(pipe), hooks(pipe)) == before


def test_settings_hold_the_defaults_of_the_pipeline(pipe: FluxPipeline) -> None:
    made = generate_stock(pipe, "a cat", settings=Settings(steps=1, height=32, width=48))
    assert made.settings == {
        "prompt": "a cat",
        "seed": 0,
        "height": 32,
        "width": 48,
        "negative_prompt": None,
        "steps": 1,
        "guidance": 3.5,
        "true_cfg": 1.0,
        "text_length": 512,
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_of_a_stock_run_that_are_not_finite(pipe: FluxPipeline, value: float) -> None:
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, value)
    with pytest.raises(NonFiniteError, match="latents after step 1"):
        generate_stock(pipe, "a cat", settings=SMALL)


def test_setting_that_the_pipeline_lacks(pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        vae_scale_factor = 2
        transformer = pipe.transformer

        def __call__(self, prompt: str, num_inference_steps: int = 4, height: int = 8, width: int = 8) -> None: ...

    assert call_arguments(Plain(), "a cat", Settings(steps=3))["num_inference_steps"] == 3
    with pytest.raises(ConfigError, match="negative_prompt: Plain takes no such setting"):
        call_arguments(Plain(), "a cat", Settings(negative_prompt="dog"))


def test_negative_prompt_leaves_a_pipeline_alone_that_heeds_it_anyway() -> None:
    pipe, _ = tiny.sd3()
    asked = call_arguments(pipe, "a cat", Settings(negative_prompt="a dog"))
    assert asked["negative_prompt"] == "a dog"
    assert "true_cfg_scale" not in asked


def test_guidance_asked_for_wins_over_the_one_for_negative_prompts(pipe: FluxPipeline) -> None:
    assert call_arguments(pipe, "a", Settings(negative_prompt="b"))["true_cfg_scale"] == 2.0
    assert call_arguments(pipe, "a", Settings(negative_prompt="b", true_cfg=4.0))["true_cfg_scale"] == 4.0
    assert "true_cfg_scale" not in call_arguments(pipe, "a", Settings())


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_size_unit_is_exactly_what_the_pipeline_draws(family: str) -> None:
    """One unit more is one unit more of picture, with packed latents and with patches."""
    pipe, _ = tiny.FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    unit = size_unit(pipe)
    size = 16 * unit
    made = generate_stock(pipe, "a cat", settings=Settings(steps=1, height=size + unit, width=size))
    assert (made.image.height, made.image.width) == (size + unit, size)
    if unit > 1:
        with pytest.raises(ConfigError, match=f"height: .* needs a multiple of {unit}"):
            generate_stock(pipe, "a cat", settings=Settings(steps=1, height=size + 1, width=size))


# -- clips ---
SHORT = Settings(steps=2, height=32, width=48, frames=5, fps=8, text_length=16, guidance=1.0)


def test_clip_of_a_stock_run_is_what_the_pipeline_draws() -> None:
    pipe, _ = tiny.wan()
    made = generate_stock(pipe, "a cat", settings=SHORT, warm_up=True)
    call = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    noise = torch.Generator().manual_seed(0)
    stock = pipe("a cat", **call, max_sequence_length=16, generator=noise, output_type="pil").frames[0]
    assert [frame.tobytes() for frame in made.media.frames] == [frame.tobytes() for frame in stock]
    assert made.media.fps == 8
    assert {"frames": 5, "fps": 8, "height": 32, "width": 48}.items() <= made.settings.items()


def test_accelerated_clip_differs_and_the_pipeline_is_stock_again() -> None:
    pipe, _ = tiny.wan()
    stock = generate_stock(pipe, "a cat", settings=SHORT)
    recipe = {"density": 0.5, "dense_steps": 0, "video": (1, 2, 2)}
    made = generate(pipe, "a cat", recipe="draft", overrides=recipe, settings=SHORT)
    assert made.report.sparse_calls == made.report.calls > 0
    assert [f.tobytes() for f in made.media.frames] != [f.tobytes() for f in stock.media.frames]
    again = generate_stock(pipe, "a cat", settings=SHORT)
    assert [f.tobytes() for f in again.media.frames] == [f.tobytes() for f in stock.media.frames]


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx"])
def test_frame_numbers_that_pipelines_would_round_are_refused(family: str) -> None:
    pipe, _ = tiny.FAMILIES[family]()  # the VAEs of all four make 4 frames one
    assert call_arguments(pipe, "a cat", Settings(frames=9))["num_frames"] == 9
    with pytest.raises(ConfigError, match="1 more than a multiple of 4, got 8; the nearest is 5 or 9"):
        call_arguments(pipe, "a cat", Settings(frames=8))


def test_speed_goes_into_the_call_of_models_that_know_it() -> None:
    ltx, wan = (tiny.FAMILIES[name]()[0] for name in ("ltx", "wan"))
    assert call_arguments(ltx, "a", Settings(fps=12))["frame_rate"] == 12
    assert "frame_rate" not in call_arguments(wan, "a", Settings(fps=12))
    assert (playing_speed(type(ltx), Settings()), playing_speed(type(wan), Settings())) == (25, 16)
    assert playing_speed(FluxPipeline, Settings(fps=12)) is None


def test_defaults_of_a_folder_yield_to_what_is_asked(tmp_path: Path) -> None:
    assert model_defaults(tmp_path) == model_defaults("owner/name") == Defaults()
    (tmp_path / "dit_accel.json").write_text('{"frames": 17, "fps": 8, "guidance": 3, "negative_prompt": "blur"}')
    settled = Settings(seed=3, fps=12.0, guidance=0.0).over(model_defaults(tmp_path))
    assert settled == Settings(seed=3, fps=12.0, guidance=0.0, frames=17, negative_prompt="blur")
