"""What `make demo` leaves behind, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from dit_accel.pipelines.demo import DENSITIES, app


def run(model: Path, out: Path) -> Result:
    return CliRunner().invoke(app, ["--model", str(model), "--out", str(out), "--quick"])


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


def test_demo_without_its_model(tmp_path: Path) -> None:
    result = run(Path("nowhere-at-all"), tmp_path)
    assert result.exit_code == 2
    assert "there is no folder nowhere-at-all" in result.stderr
