"""`dit-accel calibrate` and `generate --profile` as a person uses them, and one clear line for every bad call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import error_of, files
from typer.testing import Result

import dit_accel
from dit_accel.config import Profile
from dit_accel.pipelines.provenance import read

Cli = Callable[..., Result]
SMALL = ("--steps", 2, "--height", 64, "--width", 64, "--text-length", 16)


@pytest.fixture
def calibrate(cli: Cli, model: Path) -> Cli:
    """Run `calibrate` small and short on the tiny Flux; later options win over these."""

    def run(output: Path, *arguments: Any) -> Result:
        return cli("calibrate", model, "--recipe", "duo", "-o", output, "--prompt", "a cat", *SMALL, *arguments)

    return run


def test_a_profile_is_written_and_followed(calibrate: Cli, cli: Cli, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "duo.json"
    result = calibrate(output, "--prompt", "a dog")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"{output}: duo for FluxTransformer2DModel, 2 sites, windows: 1\nheads by pattern: "
    )
    assert "prompt 2 of 2, step 2 of 2" in result.stderr
    profile = Profile.load(output)
    assert profile.made.prompts == ("a cat", "a dog")
    assert (profile.made.steps, profile.made.version) == (2, dit_accel.__version__)
    assert files(tmp_path) == {"duo.json"}

    picture = tmp_path / "a.png"
    drawn = cli("generate", "a cat", "-o", picture, "--model", model, *SMALL, "--profile", output)
    assert drawn.exit_code == 0, drawn.output
    assert "duo: density" in drawn.stdout
    assert "by a profile made on" in drawn.stdout
    made_with = read(picture)
    assert made_with["recipe"] == "duo"
    assert made_with["profile"]["prompts"] == ["a cat", "a dog"]


def test_json_is_one_object(calibrate: Cli, tmp_path: Path) -> None:
    settings = ("--set", "sinks=0", "--density", 0.6, "--rows", 50, "--windows", 2, "--steps", 4)
    data = json.loads(calibrate(tmp_path / "a.json", "--json", *settings).stdout)
    assert data["output"] == str(tmp_path / "a.json")
    assert (data["recipe"], data["models"], data["sites"]) == ("duo", ["FluxTransformer2DModel"], 2)
    assert data["windows"] == [0.0, 0.6]
    assert sum(data["found"].values()) == 8  # two sites of two heads in two windows
    profile = Profile.load(tmp_path / "a.json")
    assert profile.made.rows == 50
    assert profile.recipe.heads is not None
    assert (profile.recipe.heads.budget, profile.recipe.keeps.sinks) == (0.6, 0)


def test_floors_of_a_clip_and_prompts_from_a_file(cli: Cli, clip_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("dance monkey\n\nthe red taco\n")
    result = cli(
        "calibrate", clip_model, "--recipe", "svg2", "-o", tmp_path / "a.json", "--prompts", tmp_path / "prompts.txt",
        "--negative-prompt", "a", "--guidance", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "floors: least: " in result.stdout
    profile = Profile.load(tmp_path / "a.json")
    assert profile.made.prompts == ("dance monkey", "the red taco")
    assert profile.made.layout == "2x2x3"
    assert profile.clamp == (0.1, 0.2)


def test_an_existing_file_is_kept_unless_forced(calibrate: Cli, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    output.write_text("mine")
    assert error_of(calibrate(output)) == f"error: output {output}: exists already; --force overwrites it."
    assert output.read_text() == "mine"
    assert calibrate(output, "--force").exit_code == 0
    assert Profile.load(output).recipe.name == "duo"
    assert files(tmp_path) == {"a.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "a.yaml"), "output a.yaml: a profile is a .json file."),
        (("-o", "missing/a.json"), "the folder missing does not exist"),
        (("--recipe", "paor"), "no recipe is called 'paor'. Did you mean 'paro'?"),
        (("--recipe", "draft"), "recipe 'draft': has nothing to calibrate"),
        (("--recipe", "vmoba"), "recipe 'vmoba': has cases"),
        (("--density", 2), "less than or equal to 1"),
        (("--set", "sinks"), "expected KEY=VALUE"),
        (("--rows", 0), "rows"),
        (("--windows", 0), "windows"),
        (("--prompts", "nowhere.txt"), "prompts nowhere.txt: cannot be read (No such file or directory)."),
        (("--height", 63), "height: FluxPipeline needs a multiple of"),
        (("--frames", 9), "frames: FluxPipeline takes no such setting."),
        (("--steps", 0), "steps: input should be greater than or equal to 1"),
        (("--set", "dense_steps=1"), "no attention call could be looked at: first 2 of 2 steps stay dense."),
        (("--device", "tpu"), "device: none is called 'tpu'"),
    ],
)
def test_bad_calls_get_one_line_and_leave_no_file(
    calibrate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(calibrate(Path("a.json"), *arguments))
    assert files(tmp_path) == set()


def test_a_model_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    result = cli("calibrate", "nowhere", "--recipe", "duo", "-o", tmp_path / "a.json")
    assert "there is no folder nowhere" in error_of(result)
    assert "Missing option '--recipe'" in error_of(cli("calibrate", "emoji-flux", "-o", tmp_path / "a.json"))


def test_profiles_that_do_not_fit_get_one_line(
    calibrate: Cli, cli: Cli, model: Path, clip_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "duo.json"
    assert calibrate(output).exit_code == 0
    target = ("generate", "a cat", "-o", tmp_path / "a.png", "--model", model, *SMALL)
    bad = [
        ((*target, "--profile", tmp_path / "b.json"), "b.json: cannot be read"),
        (
            (*target, "--profile", output, "--recipe", "moa"),
            f"{output}: made with recipe 'duo', where heads.options is 2 long",
        ),
        ((*target, "--profile", output, "--density", 0.2), "where heads.budget is 0.5; in recipe 'duo' it is 0.2."),
        (
            ("generate", "a", "-o", tmp_path / "a.gif", "--model", clip_model, "--profile", output),
            "profile: made for FluxTransformer2DModel, this is WanTransformer3DModel.",
        ),
    ]
    for arguments, message in bad:
        assert message in error_of(cli(*arguments))
    assert files(tmp_path) == {"duo.json"}
