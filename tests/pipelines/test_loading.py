"""What a person may call a model, and what is said where it is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.pipelines import loading
from dit_accel.pipelines.loading import choose_device, choose_dtype, load, locate

CPU = torch.device("cpu")


def test_folder_is_loaded_as_the_stock_pipeline(model: Path) -> None:
    pipe = load(locate(str(model)), torch.bfloat16, CPU)
    assert type(pipe) is FluxPipeline
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_shipped_name_wins_over_a_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, tmp_path / "emoji-flux")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "demo_models", lambda: ["emoji-flux"])
    monkeypatch.setattr(loading, "demo_model", lambda name: model)
    assert locate("emoji-flux") == str(model)
    assert locate("./emoji-flux") == "emoji-flux"


def test_hub_id_is_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    with pytest.raises(ConfigError, match="is no folder here, and the Hub did not give it"):
        load("black-forest-labs/FLUX.1-dev", torch.float32, CPU)  # the tests run without the Hub


@pytest.mark.parametrize("name", ["emoji-flx", "/no/such/folder", "./nowhere", "models/misspelt", "a b/c", ""])
def test_what_is_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no folder|no diffusers pipeline"):
        locate(name)


def _index(content: Any) -> Any:
    def write(folder: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model_index.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "expected a folder with a model_index.json"),
        (_index("{"), "its model_index.json cannot be read"),
        (_index([1]), "names no pipeline class"),
        (_index({"unet": 1}), "names no pipeline class"),
    ],
)
def test_folder_that_is_no_pipeline(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        locate(str(tmp_path))


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"expected a folder with a model_index\.json"):
        locate(str(tmp_path / "model.safetensors"))


def test_pipeline_without_a_transformer(tmp_path: Path) -> None:
    _index({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})(tmp_path)
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline has no diffusion transformer"):
        locate(str(tmp_path))


def test_pipeline_whose_transformer_is_left_out(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    _index({**index, "transformer": [None, None]})(folder)
    with pytest.raises(UnsupportedError, match="has no diffusion transformer"):
        locate(str(folder))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_broken_weights(model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(data[:100])
    with pytest.raises(ConfigError, match="broken: the folder cannot be loaded"):
        load(locate(str(folder)), torch.float32, CPU)


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = choose_device("auto")
    assert (cuda.type, choose_device("cpu").type, choose_device("cuda").type) == ("cuda", "cpu", "cuda")
    assert (choose_dtype(None, cuda), choose_dtype(None, CPU)) == (torch.bfloat16, torch.float32)
    assert choose_dtype("fp16", cuda) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")
