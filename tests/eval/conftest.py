"""A tiny Flux and a tiny Wan on disk, and the command line with all commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner, Result

from dit_accel.eval.cli import app


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    tiny.flux()[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    tiny.wan()[0].save_pretrained(folder)
    return folder


@pytest.fixture
def cli() -> Callable[..., Result]:
    def run(*arguments: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


SMALL = ("--steps", 4, "--height", 48, "--width", 40, "--text-length", 16, "--prompt", "a cat")


@pytest.fixture
def evaluate(cli: Callable[..., Result], model: Path) -> Callable[..., Result]:
    """Run `eval` small and short: one prompt, one recipe, one density, unless told more."""

    def run(output: Path, *arguments: Any) -> Result:
        return cli("eval", "-o", output, "--model", model, *SMALL, *arguments)

    return run
