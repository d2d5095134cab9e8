"""The commands that tell: recipes, models, doctor."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import dit_accel
from dit_accel.pipelines import doctor, listing

Cli = Callable[..., Result]


def test_recipes(cli: Cli) -> None:
    rows = json.loads(cli("recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == list(dit_accel.recipes())
    draft = next(row for row in rows if row["name"] == "draft")
    assert (draft["score"], draft["select"], draft["preset"]) == ("pooled", "percentile 0.25", False)
    assert draft["sources"] == list(dit_accel.recipes()["draft"].sources)
    table = cli("recipes").stdout
    for row in rows:
        assert row["name"] in table
        assert row["sources"][0].split(", ")[-1] in table


@pytest.fixture
def shipped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.api.demo_models", lambda: ["emoji-flux"])
    monkeypatch.setattr(listing, "demo_models", lambda: ["emoji-flux"])
    monkeypatch.setattr(listing, "demo_model", lambda name: model)


@pytest.mark.usefixtures("shipped")
def test_models(cli: Cli, model: Path) -> None:
    (row,) = json.loads(cli("models", "--json").stdout)["models"]
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    assert (row["name"], row["pipeline"], row["path"]) == ("emoji-flux", "FluxPipeline", str(model))
    assert row["mib"] == pytest.approx(size / 2**20)
    assert {"transformer", "vae", "text_encoder_2"} <= set(row["parts"])
    assert "image_encoder" not in row["parts"]
    table = cli("models").stdout
    assert "emoji-flux" in table
    assert "Any folder or Hub id" in table


@pytest.mark.usefixtures("shipped")
def test_doctor_of_a_machine_that_works(cli: Cli) -> None:
    result = cli("doctor", "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["ok"]) == (0, True), data
    found = {check["name"]: check for check in data["checks"]}
    assert set(found) == {
        "python", "torch", "diffusers", "transformers", "triton", "cuda", "kernel", "tiles", "opencv", "ffmpeg",
        "hub kernels", "demo models",
    }  # fmt: skip
    assert found["torch"]["found"].startswith(importlib.metadata.version("torch"))
    assert "back end" in found["kernel"]["found"]
    assert all(check["advice"] for check in data["checks"] if check["status"] != "ok")
    assert "demo models" in cli("doctor").stdout


def test_doctor_without_the_demo_model(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.api.demo_models", list)
    result = cli("doctor", "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["ok"]) == (2, False)
    assert {c["name"]: c["status"] for c in data["checks"]}["demo models"] == "fail"


@pytest.mark.parametrize(
    ("version", "status", "advice"),
    [
        ("0.39.2", "fail", "pip install 'diffusers>=0.40'"),
        ("0.40.0", "ok", ""),
        ("0.42.9.dev0", "ok", ""),
        ("0.43.0", "warn", "--density 1"),
        ("1.0", "warn", "--density 1"),
    ],
)
def test_doctor_on_versions(monkeypatch: pytest.MonkeyPatch, version: str, status: str, advice: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    check = doctor._version("diffusers")
    assert check.status == status
    assert advice in check.advice
    assert version in check.found


@pytest.mark.parametrize(("name", "status"), [("torch", "fail"), ("triton", "warn")])
def test_doctor_on_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, status: str) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor._version(name).status == status


def test_doctor_survives_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "_opencv", broken)
    found = {check.name: check for check in doctor.examine()}
    assert found["opencv"].status == "fail"
    assert "libGL.so.1" in found["opencv"].found


def test_folder_called_kernels_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", _only_namespace(tmp_path))
    assert "not installed" in doctor._hub_kernels().found


def _only_namespace(folder: Path) -> Callable[[str], Any]:
    from importlib.machinery import PathFinder

    return lambda name: PathFinder.find_spec(name, [str(folder)])
