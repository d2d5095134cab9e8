"""`dit-accel plan` as a person uses it, on names and on folders whose weights are never read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import error_of
from diffusers import DiffusionPipeline
from typer.testing import Result

import dit_accel

Cli = Callable[..., Result]


def test_a_folder_is_planned_without_its_weights(cli: Cli, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for file in model.rglob("*.json"):
        (bare / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (bare / file.relative_to(model)).write_bytes(file.read_bytes())
    asked = ("--size", "64x48", "--density", 0.5, "--steps", 4, "--text-length", 16, "--device", "cpu", "--json")
    result = cli("plan", "--model", bare, *asked)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    pipe = DiffusionPipeline.from_pretrained(model)
    held = dit_accel.plan(pipe, height=48, width=64, density=0.5, steps=4, text_length=16, device="cpu").to_dict()
    assert data.pop("model") == "bare"
    assert held.pop("model") == "FluxPipeline"
    for numbers in (data, held):
        numbers.pop("memory")  # half as much: a folder is planned in bf16
    assert data == json.loads(json.dumps(held))
    assert data["layout"] == "16 text + 1x12x16"


def test_what_a_folder_says_of_itself_is_taken(cli: Cli, clip_model: Path) -> None:
    result = cli("plan", "--model", clip_model, "--density", 0.5, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["width"], data["height"], data["frames"], data["steps"]) == (48, 32, 5, 2)


def test_shipped_models_and_the_table_for_people(cli: Cli) -> None:
    result = cli("plan", "--model", "emoji-flux", "--size", "64x64", "--recipe", "draft", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for part in ("emoji-flux, 64x64: draft", "single_transformer_blocks", "no times: no step was measured on cpu"):
        assert part in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "wan14b", "--size", "1280x720"], "no model is called 'wan14b'. Did you mean 'wan-14b'?"),
        (["--model", "flux"], "size: flux has none of its own; say --size WIDTHxHEIGHT"),
        (["--model", "flux", "--size", "1024"], "size: expected WIDTHxHEIGHT in pixels, such as 1280x720, got '1024'"),
        (["--model", "flux", "--size", "1024x0"], "size: expected WIDTHxHEIGHT"),
        (["--model", "emoji-flux", "--size", "65x64"], "width: emoji-flux needs a multiple of"),
        (["--model", "emoji-flux", "--size", "64x64", "--frames", "5"], "frames: emoji-flux makes pictures"),
        (["--model", "emoji-flux", "--size", "64x64", "--steps", "0"], "steps: input should be greater"),
        (["--model", "emoji-flux", "--size", "64x64", "--recipe", "balansed"], "Did you mean 'balanced'?"),
        (["--model", "emoji-flux", "--size", "64x64", "--density", "1.5"], "density: input should be less"),
        (["--model", "emoji-flux", "--size", "64x64", "--set", "evry=2"], "Did you mean 'every'?"),
        (["--model", "emoji-flux", "--size", "64x64", "--device", "h10"], "device: none that was measured is called"),
    ],
)
def test_bad_calls_are_one_clear_line(cli: Cli, arguments: list[str], message: str) -> None:
    assert message in error_of(cli("plan", *arguments))


@pytest.mark.parametrize("broken", ["no index", "no JSON", "another class"])
def test_a_broken_folder_is_one_clear_line(cli: Cli, tmp_path: Path, broken: str) -> None:
    index: dict[str, Any] = {"_class_name": "NoPipeline", "transformer": ["diffusers", "NoTransformer"]}
    if broken != "no index":
        (tmp_path / "model_index.json").write_text("{" if broken == "no JSON" else json.dumps(index))
    assert "no pipeline can be made from its configuration" in error_of(
        cli("plan", "--model", tmp_path, "--size", "64x64")
    )
