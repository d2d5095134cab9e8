"""The command line as a person uses it: the good calls, and one clear line for every bad one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT, error_of, files
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import Result

import dit_accel
from dit_accel.pipelines.media import Media
from dit_accel.pipelines.provenance import read

Draw = Callable[..., Result]
RECIPE_FILE = "base: grat-b\nname: mine\nradius: 0\n"


# -- good calls ---
def test_generate_writes_a_picture_and_reports(draw: Draw, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    result = draw(output)
    assert result.exit_code == 0, result.output
    with Image.open(output) as image:
        assert image.size == (64, 64)
    assert "draft: density 0.5" in result.stdout
    assert str(output) in result.stdout
    assert "2/2" in result.stderr  # the progress bar
    assert files(tmp_path) == {"out.png"}


def test_json_is_one_object_with_the_figures(draw: Draw, tmp_path: Path, model: Path) -> None:
    output = tmp_path / "out.png"
    result = draw(output, "--json", "--seed", 3, "--guidance", 2.5, "--set", "dense_steps=0.5")
    data = json.loads(result.stdout)
    assert data["output"] == str(output)
    assert (data["prompt"], data["seed"], data["guidance"]) == ("a cat", 3, 2.5)
    assert (data["steps"], data["height"], data["width"], data["text_length"]) == (2, 64, 64, 16)
    assert (data["model"], data["recipe"], data["device"], data["dtype"]) == (
        str(model), "draft", "cpu", "float32",
    )  # fmt: skip
    assert data["recipe_settings"]["select"] == {"kind": "percentile", "density": 0.5}
    assert 0.4 < data["density"] < 0.6
    assert data["overall_density"] == pytest.approx((1 + data["density"]) / 2)  # one of two steps is dense
    assert data["seconds"] > 0
    assert data["report"]["sparse_calls"] > 0
    assert not {"compare", "psnr", "ssim", "seconds_stock"} & set(data)
    assert "draft: density" in result.stderr


def test_compare_writes_a_sheet_and_its_figures(draw: Draw, tmp_path: Path) -> None:
    result = draw(tmp_path / "out.jpg", "--compare", "--json")
    data = json.loads(result.stdout)
    assert data["compare"] == str(tmp_path / "out-compare.png")
    assert data["seconds_stock"] > 0
    assert 10 < data["psnr"] < 100
    assert 0.5 < data["ssim"] < 1
    assert files(tmp_path) == {"out.jpg", "out-compare.png"}
    assert read(tmp_path / "out-compare.png")["prompt"] == "a cat"


def test_density_one_equals_stock(draw: Draw, tmp_path: Path) -> None:
    data = json.loads(draw(tmp_path / "out.png", "--density", 1, "--compare", "--json").stdout)
    assert data["psnr"] is None
    assert data["ssim"] == pytest.approx(1)
    assert (data["density"], data["overall_density"]) == (1, 1)


def test_same_seed_same_picture_other_seed_another(draw: Draw, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert draw(tmp_path / f"{name}.png", "--seed", seed).exit_code == 0
        pictures.append(Image.open(tmp_path / f"{name}.png").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_negative_prompt_has_an_effect(draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path / "plain.png")
    data = json.loads(draw(tmp_path / "negative.png", "--negative-prompt", "red dog", "--json").stdout)
    assert (data["negative_prompt"], data["true_cfg"]) == ("red dog", 2.0)
    assert data["report"]["calls"] == 8  # two branches, two steps, two layers
    plain, negative = (Image.open(tmp_path / name).tobytes() for name in ("plain.png", "negative.png"))
    assert plain != negative


def test_recipe_from_a_file_and_settings_by_name(draw: Draw, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE_FILE)
    more = ("--recipe", recipe, "--density", 0.4, "--set", "dense_steps=0", "--set", "picture=[1, 4, 8]")
    data = json.loads(draw(tmp_path / "out.png", *more, "--json").stdout)
    assert data["recipe"] == "mine"
    assert data["recipe_settings"]["dense_steps"] == 0
    assert data["recipe_settings"]["order"]["picture"] == [1, 4, 8]
    assert data["density"] == data["overall_density"] < 0.7


def test_preset_carries_out_a_density_that_was_asked_for(draw: Draw, tmp_path: Path) -> None:
    data = json.loads(draw(tmp_path / "out.png", "--recipe", "balanced", "--json").stdout)
    assert data["recipe_settings"]["adaptive"] is False
    assert data["report"]["sparse_calls"] > 0


def test_show_prints_what_generate_wrote(draw: Draw, cli: Callable[..., Result], tmp_path: Path) -> None:
    data = json.loads(draw(tmp_path / "out.webp", "--json").stdout)
    shown = json.loads(cli("show", tmp_path / "out.webp").stdout)
    assert shown == {key: data[key] for key in shown}
    assert {"prompt", "seed", "model", "recipe_settings", "density", "steps", "versions", "date"} <= set(shown)
    assert set(shown["versions"]) == {"dit_accel", "torch", "diffusers"}


def test_show_prints_no_control_characters(cli: Callable[..., Result], tmp_path: Path) -> None:
    from dit_accel.pipelines.provenance import write

    write(Media.picture(Image.new("RGB", (8, 8))), tmp_path / "a.png", {"prompt": "\x9b31m\x1b[2J\ud800"})
    result = cli("show", tmp_path / "a.png")
    assert json.loads(result.stdout) == {"prompt": "\x9b31m\x1b[2J\ud800"}
    assert result.stdout.replace("\n", "").isprintable()


def test_force_overwrites(draw: Draw, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    output.write_bytes(b"old")
    assert draw(output, "--force").exit_code == 0
    assert read(output)["prompt"] == "a cat"


def test_version_and_help(cli: Callable[..., Result]) -> None:
    assert cli("--version").stdout == f"dit-accel {dit_accel.__version__}\n"
    for arguments in ((), ("--help",)):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert "generate" in result.stdout


# -- what is refused before the model is loaded ---
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "drafd"), "no recipe is called 'drafd'. Did you mean 'draft'?"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml: cannot be read (No such file or directory)"),
        (("--density", 0), "density: input should be greater than 0, got 0"),
        (("--density", 1.5), "density: input should be less than or equal to 1, got 1.5"),
        (("--density", "nan"), "density"),
        (("--density", "half"), "Invalid value for '--density'"),
        (("--set", "evry=2"), "unknown setting 'evry'. Did you mean 'every'?"),
        (("--set", "every=two"), "every: input should be a valid integer, got 'two'"),
        (("--set", "every"), "--set: expected KEY=VALUE, got 'every'"),
        (("--set", "every=[1"), "--set: the value of every is no valid YAML"),
        (("--set", "density=0.3"), "--set: density is given twice"),
        (("--steps", 0), "steps: input should be greater than or equal to 1, got 0"),
        (("--steps", -1), "steps: input should be greater than or equal to 1, got -1"),
        (("--seed", -1), "seed: input should be greater than or equal to 0, got -1"),
        (("--height", 0), "height: input should be greater than or equal to 1, got 0"),
        (("--text-length", 0), "text_length: input should be greater than or equal to 1, got 0"),
        (("--guidance", "inf"), "guidance: input should be a finite number, got inf"),
        (("--dtype", "fp23"), "dtype: none is called 'fp23'. Did you mean 'fp32'?"),
        (("--dtype", "fp16", "--device", "cpu"), "dtype: fp16 needs a GPU; on a CPU use fp32 or bf16"),
        (("--device", "gpu"), "device: none is called 'gpu'"),
        (("--model", "emoji-flx"), "there is no folder emoji-flx"),
        (("--stepz", 3), "No such option: --stepz"),
    ],
)
def test_bad_option(draw: Draw, tmp_path: Path, no_loading: None, arguments: tuple[Any, ...], message: str) -> None:
    assert message in error_of(draw(tmp_path / "out.png", *arguments))
    assert files(tmp_path) == set()


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dit_accel.pipelines.job.load", load)


def test_cuda_without_cuda(draw: Draw, tmp_path: Path, no_loading: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device here" in error_of(draw(tmp_path / "out.png", "--device", "cuda"))


def test_misspelt_shipped_model(draw: Draw, tmp_path: Path, no_loading: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.pipelines.loading.demo_models", lambda: ["emoji-flux"])
    error = error_of(draw(tmp_path / "out.png", "--model", "emoji-flx"))
    assert "Did you mean 'emoji-flux'?" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.pgn", "Did you mean '.png'?"),
        ("missing/out.png", "missing does not exist"),
        ("here.png", "exists already; --force overwrites it"),
        ("sheet.png", "sheet-compare.png: exists already"),
    ],
)
def test_bad_output(draw: Draw, tmp_path: Path, no_loading: None, name: str, message: str) -> None:
    for existing in ("here.png", "sheet-compare.png"):
        (tmp_path / existing).write_bytes(b"mine")
    assert message in error_of(draw(tmp_path / name, "--compare"))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"mine"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even the superuser")
def test_unwritable_folder(draw: Draw, no_loading: None) -> None:
    assert "/proc/out.png: cannot be written" in error_of(draw(Path("/proc/out.png")))


def test_unknown_command(cli: Callable[..., Result]) -> None:
    assert "No such command 'genrate'. Did you mean 'generate'?" in error_of(cli("genrate"))


def test_missing_prompt_and_output(cli: Callable[..., Result]) -> None:
    assert "missing argument 'prompt'" in error_of(cli("generate", "-o", "x.png")).lower()
    assert "Missing option '--output'" in error_of(cli("generate", "a cat"))


def test_show_of_what_is_no_picture(cli: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"garbage")
    assert "a.png: is no picture" in error_of(cli("show", tmp_path / "a.png"))
    assert "there is no such file" in error_of(cli("show", tmp_path / "b.png"))


# -- what the model or the run shows ---
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", 66), "height: FluxPipeline needs a multiple of 4, got 66; the nearest is 64 or 68"),
        (("--width", 3), "width: FluxPipeline needs a multiple of 4, got 3; the nearest is 4"),
        (("--text-length", 513), "cannot be greater than 512"),
    ],
)
def test_settings_that_the_pipeline_refuses(
    draw: Draw, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    assert message in error_of(draw(tmp_path / "out.png", *arguments))
    assert files(tmp_path) == set()


def poison(model: Path, folder: Path, part: str, weight: str, value: float) -> Path:
    """Copy a model and fill one of its weights."""
    shutil.copytree(model, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[weight] = torch.full_like(weights[weight], value)
    save_file(weights, file)
    return folder


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(draw: Draw, model: Path, tmp_path: Path, steps: int, value: float) -> None:
    bad = poison(model, tmp_path / "bad", "transformer", "proj_out.weight", value)
    error = error_of(draw(tmp_path / "out.png", "--model", bad, "--steps", steps))
    assert "the latents after step 0 hold NaN or Inf" in error
    assert files(tmp_path) == {"bad"}


def test_pixels_that_are_not_finite(draw: Draw, model: Path, tmp_path: Path) -> None:
    bad = poison(model, tmp_path / "bad", "vae", "decoder.conv_out.weight", float("nan"))
    assert "the pixels hold NaN or Inf" in error_of(draw(tmp_path / "out.png", "--model", bad))
    assert files(tmp_path) == {"bad"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(AutoencoderKL, "decode", _raiser(error))
    assert error_of(draw(tmp_path / "out.png")).startswith("error: out of memory; try a smaller --height")
    assert files(tmp_path) == set()


def test_unexpected_error_is_one_line_unless_debugging(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoencoderKL, "decode", _raiser(RuntimeError("first line\nsecond line")))
    error = error_of(draw(tmp_path / "out.png"))
    assert error == "error: RuntimeError: first line (--debug shows where)"
    debugged = draw(tmp_path / "out.png", "--debug")
    monkeypatch.setenv("DIT_ACCEL_DEBUG", "1")
    for result in (debugged, draw(tmp_path / "out.png")):
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "second line" in result.stderr


def test_interruption_in_a_run(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", _raiser(KeyboardInterrupt()))
    result = draw(tmp_path / "out.png")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in result.stderr
    assert files(tmp_path) == set()


def _raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# -- real processes ---
def test_real_process(model: Path, tmp_path: Path) -> None:
    command = ["dit-accel", "generate", "a cat", "--model", str(model), "--steps", "1", "--height", "32"]
    command += ["--width", "32", "--text-length", "8", "--density", "0.5", "--json", "-o", "out.png"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "out.png"
    assert read(tmp_path / "out.png")["steps"] == 1


def _listen() -> None:
    """Hear SIGINT, which the children of a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_real_interruption(model: Path, tmp_path: Path) -> None:
    small = ["--model", str(model), "--height", "32", "--width", "32", "--text-length", "8"]
    command = [
        "dit-accel",
        "generate",
        "a cat",
        *small,
        "--density",
        "0.5",
        "--steps",
        "100000",
        "-o",
        "out.png",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, bufsize=0, preexec_fn=_listen
    )
    assert process.stderr is not None
    seen = b""
    while b"/100000 [" not in seen:  # the progress bar: denoising has begun
        piece = process.stderr.read(256)
        assert piece, seen.decode()
        seen += piece
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode()
    assert process.wait(timeout=60) == 130
    assert rest.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in rest
    assert files(tmp_path) == set()
