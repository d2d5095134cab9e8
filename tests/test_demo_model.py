"""emoji-flux: stock diffusers loads and runs it, and the engine holds on really trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import dit_accel

MIB = 1 << 20
SMALL = {"height": 128, "width": 128, "max_sequence_length": 32, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(dit_accel.demo_model("emoji-flux"), torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, prompt: str | list[str] = "taco, noto style", steps: int = 4, seed: int = 0, **changes: Any) -> Any:
    call = {**SMALL, "num_inference_steps": steps, **changes}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * (a.float() - b.float()).square().mean().log10())


def test_sizes_on_disk() -> None:
    files = [f for f in dit_accel.demo_model("emoji-flux").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20 * MIB
    assert max(f.stat().st_size for f in files) < 16 * MIB


def test_the_card_names_every_source_and_licence() -> None:
    card = (dit_accel.demo_model("emoji-flux") / "README.md").read_text()
    for word in ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-3d", "emojibase-data"):
        assert word in card
    for licence in ("Apache-2.0", "CC-BY-4.0", "MIT"):
        assert licence in card


def test_default_size_is_256_and_text_may_have_512_tokens(pipe: FluxPipeline) -> None:
    seen: list[str] = []
    with dit_accel.accelerate(pipe, "grat", dense_steps=0) as handle:
        pipe("taco, noto style", num_inference_steps=1, output_type="latent")
        seen.append(handle.report().layout)
    assert seen == ["512 text + 1x64x64"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_loading_upcasts_the_stored_matrices(dtype: torch.dtype) -> None:
    loaded = FluxPipeline.from_pretrained(dit_accel.demo_model("emoji-flux"), torch_dtype=dtype)
    assert {p.dtype for p in loaded.transformer.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in loaded.transformer.parameters())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_density_one_is_stock(pipe: FluxPipeline, guidance: float) -> None:
    call = {"steps": 2, "true_cfg_scale": guidance, "negative_prompt": [""] * 3, "height": 76, "width": 108}
    stock = draw(pipe, ["taco, noto style"] * 3, **call)
    with dit_accel.accelerate(pipe, "draft", density=1):
        assert torch.equal(draw(pipe, ["taco, noto style"] * 3, **call), stock)


@pytest.mark.parametrize("recipe", ["draft", "grat-b", "grat-x", str(Path("examples") / "my_recipe.yaml")])
def test_sparse_pictures_differ_from_stock_and_stay_close(pipe: FluxPipeline, recipe: str) -> None:
    root = Path(__file__).parent.parent
    chosen = root / recipe if recipe.endswith("yaml") else recipe
    stock, other = draw(pipe), draw(pipe, "delivery truck, noto style")
    with dit_accel.accelerate(pipe, chosen, density=0.5) as handle:
        sparse = draw(pipe)
    assert handle.report().sparse_calls > 0
    assert handle.report().density == pytest.approx(0.5, rel=0.2)
    assert not torch.equal(sparse, stock)
    assert psnr(sparse, stock) > psnr(other, stock) + 6, "farther than half way to another prompt's picture"


def test_more_density_is_closer(pipe: FluxPipeline) -> None:
    stock = draw(pipe)
    close = []
    for density in (0.25, 0.9):
        with dit_accel.accelerate(pipe, "draft", density=density):
            close.append(psnr(draw(pipe), stock))
    assert close[1] > close[0] + 3


@pytest.mark.full
def test_pipeline_defaults_draw_the_concept(pipe: FluxPipeline) -> None:
    """No argument but the prompt: 256 px, 28 steps, 512 text tokens; red and green, as a watermelon is."""
    picture = pipe("watermelon, fluent flat style", output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert picture.shape[-2:] == (256, 256)
    pixels = picture[0].float().flatten(1)
    red = ((pixels[0] > 0.7) & (pixels[1] < 0.4)).float().mean()
    green = ((pixels[1] > 0.35) & (pixels[0] < 0.35)).float().mean()
    assert red > 0.1
    assert green > 0.03
