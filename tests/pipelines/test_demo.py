"""What `make demo` leaves behind, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dit_accel.pipelines.demo import DENSITIES, app
from dit_accel.pipelines.provenance import read


@pytest.fixture(autouse=True)
def _no_shipped_clip_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.pipelines.demo.demo_models", lambda: ["emoji-flux"])


def run(model: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["--model", str(model), "--out", str(out), "--quick", *more])


def test_demo_writes_pictures_and_says_where(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "demo"
    result = run(model, out)
    assert result.exit_code == 0, result.output
    singles = {
        "watermelon-fluent-flat-style-stock.png",
        *(f"watermelon-fluent-flat-style-density-{d}.png" for d in DENSITIES),
    }
    assert {path.name for path in out.iterdir()} == {"side-by-side.png", *singles}
    assert len({Image.open(out / name).tobytes() for name in singles}) == 3
    assert str(out / "side-by-side.png") in result.stdout
    assert "PSNR" in result.stdout
    assert result.stdout.count("density 0.") >= 2  # a report for each density
    again = run(model, out)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("name", ["side-by-side.png", "watermelon-fluent-flat-style-stock.png"])
def test_demo_keeps_files_that_it_did_not_make(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    result = run(model, tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert f"{name}: exists already" in result.stderr
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.fixture
def larger_clip_model(clip_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip model, asked for clips of more tokens than a run of queries has: there is something to skip."""
    folder = tmp_path_factory.mktemp("larger") / clip_model.name
    shutil.copytree(clip_model, folder)
    defaults = json.loads((folder / "dit_accel.json").read_text())
    (folder / "dit_accel.json").write_text(json.dumps(defaults | {"height": 128, "width": 160}))
    return folder


def test_demo_makes_a_clip_too(model: Path, larger_clip_model: Path, tmp_path: Path) -> None:
    clip_model = larger_clip_model
    result = run(model, tmp_path, "--clip-model", str(clip_model))
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir() if path.suffix == ".gif"}
    stem = "a-taco-sliding-left-noto-style"
    assert names == {"side-by-side.gif", f"{stem}-stock.gif", f"{stem}-density-{DENSITIES[0]}.gif"}
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert getattr(image, "n_frames", 1) == 5, name
    assert read(tmp_path / f"{stem}-stock.gif")["fps"] == 8
    assert "temporal error" in result.stdout
    assert result.stdout.count("where sparse") == 3  # two reports of pictures, one of the clip
    assert str(tmp_path / "side-by-side.gif") in result.stdout
    assert run(model, tmp_path, "--clip-model", str(clip_model)).exit_code == 0


def test_clip_model_that_is_shipped_is_used(
    model: Path, clip_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.pipelines.demo.demo_models", lambda: ["emoji-flux", "emoji-wan"])
    monkeypatch.setattr("dit_accel.pipelines.loading.demo_models", lambda: ["emoji-wan"])
    monkeypatch.setattr("dit_accel.pipelines.loading.demo_model", lambda name: clip_model)
    assert run(model, tmp_path).exit_code == 0
    assert (tmp_path / "side-by-side.gif").exists()


def test_demo_without_its_model(tmp_path: Path) -> None:
    result = run(Path("nowhere-at-all"), tmp_path)
    assert result.exit_code == 2
    assert "there is no folder nowhere-at-all" in result.stderr
