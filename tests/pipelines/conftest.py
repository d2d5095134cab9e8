"""Tiny random pipelines on disk, Flux and Wan, which stand for any model a person might name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel
from typer.testing import CliRunner, Result

from dit_accel.pipelines.cli import app

SPECIAL = ["<pad>", "</s>", "<unk>"]


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, "a", "cat", "dog", "taco", "noto", "style"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def flux_pipeline() -> FluxPipeline:
    """Make a Flux pipeline with one block of each kind, an f2 VAE of four channels, and heads of 16."""
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_dim=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer(77),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer(512),
        transformer=transformer,
        vae=vae,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep such small work on one thread: threads that wait for busy cores cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pipe() -> FluxPipeline:
    return flux_pipeline()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    flux_pipeline().save_pretrained(folder)
    return folder


DEFAULTS = {"height": 32, "width": 48, "frames": 5, "fps": 8, "steps": 2, "guidance": 1.0, "text_length": 16}


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.wan()[0].save_pretrained(folder)
    (folder / "dit_accel.json").write_text(json.dumps(DEFAULTS))
    return folder


@pytest.fixture
def cli() -> Callable[..., Result]:
    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def draw(cli: Callable[..., Result], model: Path) -> Callable[..., Result]:
    """Run `generate` small and short; later options win over these."""

    def run(output: Path, *arguments: Any) -> Result:
        small = ("--steps", 2, "--height", 64, "--width", 64, "--text-length", 16)
        sparse = ("--recipe", "draft", "--density", 0.5)
        return cli("generate", "a cat", "-o", output, "--model", model, *small, *sparse, *arguments)

    return run
