"""`dit-accel explain`: what it writes and prints for a picture and a clip, and its one-line refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import error_of, files
from PIL import Image
from typer.testing import Result

from dit_accel.pipelines.provenance import read

Run = Callable[..., Result]
SMALL = ("--steps", 3, "--height", 64, "--width", 48, "--text-length", 16)


@pytest.fixture
def look(cli: Run, model: Path) -> Run:
    def run(output: Path, *more: Any) -> Result:
        asked = ("--site", 1, "--step", 2, "--density", 0.5, "--set", "picture=[1,8,8]")
        return cli("explain", "a cat", "-o", output, "--model", model, *SMALL, *asked, *more)

    return run


def test_a_picture_carries_its_figures(look: Run, tmp_path: Path) -> None:
    output = tmp_path / "look.png"
    result = look(output, "--head", 1, "--negative-prompt", "a dog", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["output"] == str(output)
    assert [call["branch"] for call in data["calls"]] == ["cond", "uncond"]
    assert all(0 < recall <= 1 for call in data["calls"] for recall in call["recall"][0])
    assert data["calls"] == read(output)["explained"]["calls"]
    assert read(output)["prompt"] == "a cat"
    one_head = Image.open(output).height
    assert look(tmp_path / "all.png", "--negative-prompt", "a dog").exit_code == 0
    assert Image.open(tmp_path / "all.png").height > one_head


def test_a_clip_is_looked_into_by_the_name_of_a_site(cli: Run, clip_model: Path, tmp_path: Path) -> None:
    asked = ("--site", "blocks.0.attn1", "--step", 1, "--query", "1,1,2", "--density", 0.5, "--set", "dense_steps=0")
    output = tmp_path / "look.png"
    result = cli("explain", "a cat", "-o", output, "--model", clip_model, *asked, "--set", "video=[1,2,3]")
    assert result.exit_code == 0, result.output
    assert "blocks.0.attn1 at step 1" in result.stdout
    assert result.stdout.splitlines()[-1] == str(output)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--site", 7), "site must lie in 0..1, got 7"),
        (("--step", 3), "step: must lie in 0..2, got 3"),
        (("--step", 0), "no call chose pairs (first 1 of 3 steps stay dense)"),
        (("--query", "0,1"), "query: expected FRAME,ROW,COLUMN"),
        (("--query", "0,99,1"), "query (0, 99, 1) lies outside the grid of 1x16x12 tokens"),
        (("--head", 2), "1 samples and 2 heads, counted from 0; sample 0, head 2 was asked for"),
        (("--recipe", "drft"), "Did you mean 'draft'?"),
        (("--frames", 5), "frames: FluxPipeline takes no such setting"),
    ],
)
def test_what_cannot_be_shown_is_one_line(look: Run, tmp_path: Path, more: tuple[Any, ...], said: str) -> None:
    result = look(tmp_path / "look.png", *more)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert result.stdout == ""
    assert not files(tmp_path)


def test_an_output_that_is_no_picture_or_exists_is_refused(look: Run, tmp_path: Path) -> None:
    assert "explain makes pictures" in error_of(look(tmp_path / "look.mp4"))
    (tmp_path / "look.png").write_bytes(b"mine")
    assert "exists already" in error_of(look(tmp_path / "look.png"))
    assert (tmp_path / "look.png").read_bytes() == b"mine"
