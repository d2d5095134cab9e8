"""emoji-wan: stock diffusers loads and runs it, and the engine holds on really trained video weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import dit_accel

MIB = 1 << 20
FOLDER = dit_accel.demo_model("emoji-wan")
LATENTS = {"height": 224, "width": 352, "num_frames": 17, "output_type": "latent"}  # 5 x 7 x 11 tokens
TRAINED = {"height": 384, "width": 512, "num_frames": 81, "guidance_scale": 1.0, "steps": 2}  # 4,032 tokens


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    loaded = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, prompt: str | list[str] = "a taco sliding left, noto style", steps: int = 3, **changes: Any) -> Any:
    call = {**LATENTS, "num_inference_steps": steps, "guidance_scale": 3.0, **changes}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).frames


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_sizes_on_disk() -> None:
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert max(f.stat().st_size for f in files) < 16 * MIB
    models = [f for name in dit_accel.demo_models() for f in dit_accel.demo_model(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in models) <= 36 * MIB


def test_the_card_names_every_source_and_licence() -> None:
    card = (FOLDER / "README.md").read_text()
    for word in ("Noto", "Twemoji", "Fluent Emoji", "Apache-2.0", "CC-BY-4.0", "MIT"):
        assert word in card


@pytest.mark.parametrize("name", dit_accel.demo_models())
def test_no_folder_of_the_machine_that_trained_it_is_named(name: str) -> None:
    for file in dit_accel.demo_model(name).glob("*/*config.json"):
        assert not Path(json.loads(file.read_text()).get("_name_or_path", "")).is_absolute(), file


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_density_one_is_stock(pipe: WanPipeline, guidance: float) -> None:
    prompts = ["a taco sliding left, noto style", "a watermelon growing, fluent 3d style"]
    stock = draw(pipe, prompts, steps=2, guidance_scale=guidance)
    with dit_accel.accelerate(pipe, "draft", density=1):
        assert torch.equal(draw(pipe, prompts, steps=2, guidance_scale=guidance), stock)


@pytest.fixture(scope="module")
def stock(pipe: WanPipeline) -> torch.Tensor:
    return draw(pipe, **TRAINED)


@pytest.fixture(scope="module")
def other(pipe: WanPipeline) -> torch.Tensor:
    return draw(pipe, "a delivery truck growing, noto style", **TRAINED)


RARER = [pytest.param(name, marks=pytest.mark.full) for name in ("grat-x", "svg2")]
GRAT_B = pytest.mark.xfail(
    strict=True,
    reason="a shortfall: by its rule of place a clip at .5 is .65 from stock, where another prompt's is .74",
)


@pytest.fixture(scope="module")
def errors(pipe: WanPipeline, stock: torch.Tensor) -> Callable[[str], list[float]]:
    """How far a recipe at .5 and at .9 is from stock; each is drawn once."""

    @cache
    def measured(recipe: str) -> list[float]:
        found = []
        for density in (0.5, 0.9):
            with dit_accel.accelerate(pipe, recipe, density=density) as handle:
                found.append(error(draw(pipe, **TRAINED), stock))
            assert handle.report().sparse_calls > 0
        return found

    return measured


@pytest.mark.parametrize("recipe", ["draft", pytest.param("grat-b", marks=pytest.mark.full), *RARER])
def test_more_density_is_closer(errors: Callable[[str], list[float]], recipe: str) -> None:
    half, most = errors(recipe)
    assert 0 < most < 0.6 * half


@pytest.mark.parametrize("recipe", ["draft", pytest.param("grat-b", marks=[pytest.mark.full, GRAT_B]), *RARER])
def test_sparse_clips_stay_close(
    errors: Callable[[str], list[float]], stock: torch.Tensor, other: torch.Tensor, recipe: str
) -> None:
    assert errors(recipe)[0] < 0.6 * error(other, stock)


def test_the_folder_says_how_it_is_best_asked() -> None:
    from dit_accel.pipelines.settings import model_defaults

    defaults = model_defaults(FOLDER)
    assert (defaults.height, defaults.width, defaults.frames) == (384, 512, 81)


@pytest.mark.full
def test_the_default_clip_moves_as_asked(pipe: WanPipeline) -> None:
    """The size of `dit_accel.json`: what is not white moves to the left by a good part of the picture."""
    clip = draw(pipe, height=384, width=512, num_frames=81, steps=12, output_type="pt")[0].float()
    assert clip.shape[-2:] == (384, 512)
    ink = 1 - clip.mean(1)  # [frames, height, width]
    columns = torch.linspace(0, 1, 512)
    first, last = (float((frame.sum(0) * columns).sum() / frame.sum()) for frame in (ink[4], ink[-5]))
    assert last < first - 0.1
