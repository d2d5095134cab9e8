"""Clips from the command line: four video families, every format, comparisons, and one clear line for what is wrong."""

from __future__ import annotations

import json
import math
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import tiny
import torch
from commands import ENVIRONMENT, error_of, files
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from typer.testing import Result

from dit_accel.pipelines.provenance import read

Film = Callable[..., Result]
SPARSE = ("--recipe", "draft", "--density", 0.5, "--set", "dense_steps=0")


@pytest.fixture
def film(cli: Callable[..., Result], clip_model: Path) -> Film:
    """Run `generate` with the tiny Wan as its folder's defaults ask for it; later options win."""

    def run(output: Path, *arguments: Any) -> Result:
        return cli("generate", "dance monkey", "-o", output, "--model", clip_model, *SPARSE, *arguments)

    return run


def frames_of(path: Path) -> np.ndarray:
    """Decode a clip independently of our code, uint8 [frames, height, width, 3]."""
    if path.suffix != ".mp4":
        with Image.open(path) as image:
            return np.stack([_seek(image, i) for i in range(getattr(image, "n_frames", 1))])
    reader: Iterator[Any] = imageio_ffmpeg.read_frames(path)
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def _seek(image: Image.Image, frame: int) -> np.ndarray:
    image.seek(frame)
    return np.asarray(image.convert("RGB"))


# -- good calls ---
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_the_clip_is_what_the_stock_pipeline_makes(film: Film, clip_model: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"clip{suffix}"
    result = film(output, "--density", 1, "--json", "--seed", 4)
    data = json.loads(result.stdout)
    pipe = WanPipeline.from_pretrained(clip_model)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(
        "dance monkey", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=16, generator=torch.Generator().manual_seed(4),
    ).frames[0]  # fmt: skip
    shown = frames_of(output)
    assert shown.shape == (5, 32, 48, 3)
    error = np.sqrt(np.mean((shown / 255 - stock) ** 2))
    assert error < 0.05, "lossy formats, the same frames in the same order"
    assert error < np.sqrt(np.mean((shown[::-1] / 255 - stock) ** 2))
    defaults = json.loads((clip_model / "dit_accel.json").read_text())
    assert {key: data[key] for key in defaults} == defaults
    assert files(tmp_path) == {output.name}


def test_what_is_asked_wins_over_the_folder(film: Film, tmp_path: Path) -> None:
    data = json.loads(film(tmp_path / "a.mp4", "--frames", 9, "--fps", 12.5, "--width", 32, "--json").stdout)
    assert (data["frames"], data["fps"], data["width"], data["height"]) == (9, 12.5, 32, 32)
    assert data["report"]["layout"] == "3x2x2"
    assert len(frames_of(tmp_path / "a.mp4")) == 9


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_show_prints_what_generate_wrote(film: Film, cli: Callable[..., Result], tmp_path: Path, suffix: str) -> None:
    data = json.loads(film(tmp_path / f"clip{suffix}", "--json").stdout)
    shown = json.loads(cli("show", tmp_path / f"clip{suffix}").stdout)
    assert shown == {key: data[key] for key in shown}
    assert {"prompt", "seed", "model", "recipe_settings", "frames", "fps", "versions", "date"} <= set(shown)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_compare_writes_a_clip_of_three(film: Film, tmp_path: Path, suffix: str) -> None:
    result = film(tmp_path / f"a{suffix}", "--compare", "--json")
    data = json.loads(result.stdout)
    assert data["compare"] == str(tmp_path / f"a-compare{suffix}")
    assert files(tmp_path) == {f"a{suffix}", f"a-compare{suffix}"}
    assert len(frames_of(tmp_path / f"a-compare{suffix}")) == 5
    assert frames_of(tmp_path / f"a-compare{suffix}").shape[2] > 3 * 240  # three cells, enlarged
    assert len(data["frame_psnr"]) == len(data["frame_ssim"]) == 5
    differing = [ratio for ratio in data["frame_psnr"] if ratio is not None]
    assert data["psnr"] == pytest.approx(np.mean(differing))
    assert data["psnr_min"] == min(differing) < 100
    assert data["ssim_min"] == min(data["frame_ssim"]) < data["ssim"] < 1
    assert 0 < data["temporal_error"] < 255
    assert "worst frame" in result.stderr
    assert read(tmp_path / f"a-compare{suffix}")["frames"] == 5


def test_density_one_equals_stock(film: Film, tmp_path: Path) -> None:
    data = json.loads(film(tmp_path / "a.gif", "--density", 1, "--compare", "--json").stdout)
    assert data["psnr"] is None
    assert data["frame_psnr"] == [None] * 5
    assert data["temporal_error"] == 0
    assert data["ssim_min"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("family", "size", "frames", "fps"),
    [
        ("hunyuan_video", (80, 48), 5, 16),
        ("cogvideox", (48, 32), 9, 16),
        ("ltx", (32, 64), 9, 25),
        ("ltx", (32, 32), 257, 25),
        ("hunyuan_video", (16, 32), 1, 16),
        ("cogvideox", (48, 32), 1, 16),
    ],
)
def test_other_families_and_one_and_many_frames(
    cli: Callable[..., Result], tmp_path: Path, family: str, size: tuple[int, int], frames: int, fps: float
) -> None:
    tiny.FAMILIES[family]()[0].save_pretrained(tmp_path / "model")
    small = ("--height", size[0], "--width", size[1], "--frames", frames, "--text-length", 16, "--steps", 1)
    output = tmp_path / "a.mp4"
    result = cli("generate", "dance", "-o", output, "--model", tmp_path / "model", *small, *SPARSE, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["frames"], data["fps"], data["report"]["sparse_calls"] > 0) == (frames, fps, True)
    assert frames_of(output).shape == (frames, *size, 3)


def test_frames_that_a_pipeline_adds_are_said(cli: Callable[..., Result], tmp_path: Path) -> None:
    """CogVideoX decodes an even number of latent frames to four each, without the shorter first."""
    tiny.cogvideox()[0].save_pretrained(tmp_path / "model")
    small = ("--height", 48, "--width", 32, "--frames", 5, "--text-length", 16, "--steps", 1)
    result = cli("generate", "dance", "-o", tmp_path / "a.mp4", "--model", tmp_path / "model", *small, *SPARSE)
    assert "frames: 8 (5 asked) at 16 a second" in result.stdout
    shown = read(tmp_path / "a.mp4")
    assert (shown["frames"], shown["frames_asked"], len(frames_of(tmp_path / "a.mp4"))) == (8, 5, 8)


def test_one_frame_compared(film: Film, tmp_path: Path) -> None:
    data = json.loads(film(tmp_path / "a.mp4", "--frames", 1, "--compare", "--json").stdout)
    assert data["frames"] == 1
    assert "temporal_error" not in data
    assert len(frames_of(tmp_path / "a-compare.mp4")) == 1


def test_odd_sizes_are_padded_and_said(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No video model makes odd sizes, so the last column and row are cut off behind its back."""
    decode = AutoencoderKLWan.decode

    def odd(self: AutoencoderKLWan, *arguments: Any, **more: Any) -> Any:
        return (decode(self, *arguments, **more)[0][..., :-1, :-1],)

    monkeypatch.setattr(AutoencoderKLWan, "decode", odd)
    result = film(tmp_path / "a.mp4")
    assert "stored as 48x32, the edge repeated, because H.264 takes even sides" in result.stdout
    assert frames_of(tmp_path / "a.mp4").shape == (5, 32, 48, 3)
    shown = read(tmp_path / "a.mp4")
    assert (shown["height"], shown["width"], shown["stored_size"]) == (31, 47, [48, 32])
    assert "stored as" not in film(tmp_path / "a.gif").stdout
    assert frames_of(tmp_path / "a.gif").shape == (5, 31, 47, 3)


def test_real_process(clip_model: Path, tmp_path: Path) -> None:
    """What ffmpeg prints goes past the test runner; here nothing of it may reach stdout."""
    command = [
        "dit-accel",
        "generate",
        "a cat",
        "--model",
        str(clip_model),
        *map(str, SPARSE),
        "--json",
        "-o",
        "-a.mp4",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == "-a.mp4"
    assert files(tmp_path) == {"-a.mp4"}
    assert len(frames_of(tmp_path / "-a.mp4")) == 5


# -- which model ---
def ship(monkeypatch: pytest.MonkeyPatch, **models: Path) -> None:
    names = {name.replace("_", "-"): folder for name, folder in models.items()}
    monkeypatch.setattr("dit_accel.pipelines.loading.demo_models", lambda: sorted(names))
    monkeypatch.setattr("dit_accel.pipelines.loading.demo_model", names.__getitem__)


@pytest.mark.parametrize(
    ("name", "more", "maker"),
    [
        ("a.mp4", (), "emoji-wan"),
        ("a.GIF", (), "emoji-wan"),
        ("a.webp", ("--frames", 5), "emoji-wan"),
        ("a.webp", ("--fps", 5), "emoji-wan"),
        ("a.webp", (), "emoji-flux"),
        ("a.png", (), "emoji-flux"),
    ],
)
def test_the_name_chooses_the_model(
    cli: Callable[..., Result], model: Path, clip_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, more: tuple[Any, ...], maker: str,
) -> None:  # fmt: skip
    ship(monkeypatch, emoji_flux=model, emoji_wan=clip_model)
    small = ("--height", 32, "--width", 32, "--text-length", 8, "--steps", 1, "--json", *more)
    data = json.loads(cli("generate", "a cat", "-o", tmp_path / name, *small).stdout)
    assert data["model"] == maker
    assert ("frames" in data) == (maker == "emoji-wan")


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_clip_without_its_model(
    cli: Callable[..., Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ship(monkeypatch, emoji_flux=model)
    error = error_of(cli("generate", "a taco", "-o", tmp_path / name))
    assert error == "error: model: emoji-wan, which makes clips, is not installed here; name another with --model."


# -- one clear line ---
@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dit_accel.pipelines.job.load", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a.mp5", (), "no picture or clip format is called '.mp5'. Did you mean '.mp4'?"),
        ("a.png", (), "WanPipeline makes clips; name a .gif, .mp4 or .webp file"),
        ("a.jpg", ("--frames", 1), "WanPipeline makes clips; name a .gif, .mp4 or .webp file"),
        ("a.mp4", ("--fps", 0), "fps: input should be greater than or equal to 1, got 0"),
        ("a.mp4", ("--fps", -8), "fps: input should be greater than or equal to 1, got -8"),
        ("a.mp4", ("--fps", 121), "fps: input should be less than or equal to 120, got 121"),
        ("a.mp4", ("--fps", "nan"), "fps: input should be"),
        ("a.mp4", ("--fps", "inf"), "fps: input should be"),
        ("a.gif", ("--fps", 60), "fps: .gif takes at most 50 frames a second, got 60"),
        ("a.mp4", ("--frames", 0), "frames: input should be greater than or equal to 1, got 0"),
        ("a.mp4", ("--frames", "9.5"), "Invalid value for '--frames'"),
        ("a.mp4", ("--true-cfg", 2), "true_cfg: WanPipeline takes no such setting"),
        ("here.mp4", (), "here.mp4: exists already; --force overwrites it"),
        ("b.gif", ("--compare",), "b-compare.gif: exists already"),
        ("missing/a.mp4", (), "missing does not exist"),
    ],
)
def test_bad_calls(film: Film, tmp_path: Path, name: str, arguments: tuple[Any, ...], message: str) -> None:
    for existing in ("here.mp4", "b-compare.gif"):
        (tmp_path / existing).write_bytes(b"mine")
    assert message in error_of(film(tmp_path / name, *arguments))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"mine"}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("a.mp4", (), "FluxPipeline makes pictures; name a .jpeg, .jpg, .png or .webp file, or a video model"),
        ("a.gif", (), "FluxPipeline makes pictures"),
        ("a.png", ("--frames", 5), "frames: FluxPipeline takes no such setting"),
        ("a.webp", ("--fps", 5), "fps: FluxPipeline takes no such setting"),
    ],
)
def test_picture_model_for_a_clip(
    cli: Callable[..., Result], model: Path, tmp_path: Path, name: str, more: tuple[Any, ...], message: str
) -> None:
    assert message in error_of(cli("generate", "a cat", "-o", tmp_path / name, "--model", model, *more))
    assert files(tmp_path) == set()


@pytest.mark.usefixtures("no_loading")
def test_model_that_needs_a_picture(film: Film, clip_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i2v"
    folder.mkdir()
    index = json.loads((clip_model / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanImageToVideoPipeline"}))
    error = error_of(film(tmp_path / "a.mp4", "--model", folder))
    assert "WanImageToVideoPipeline makes nothing from a prompt alone" in error
    assert "it needs image" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--frames", 6), "frames: WanPipeline needs 1 more than a multiple of 4, got 6; the nearest is 5 or 9"),
        (("--height", 40), "height: WanPipeline needs a multiple of 16, got 40; the nearest is 32 or 48"),
        (("--width", 47), "width: WanPipeline needs a multiple of 16, got 47; the nearest is 32 or 48"),
    ],
)
def test_sizes_that_the_pipeline_refuses(film: Film, tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    assert message in error_of(film(tmp_path / "a.mp4", *arguments))
    assert files(tmp_path) == set()


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ("[1]", "expected a mapping"),
        ('{"frame": 5}', "unknown setting 'frame'. Did you mean 'frames'?"),
        ('{"seed": 5}', "unknown setting 'seed'"),
        ('{"fps": 1000}', "fps: input should be less than or equal to 120, got 1000"),
        ('{"height": "big"}', "height: input should be a valid integer, got 'big'"),
    ],
)
def test_broken_defaults(film: Film, clip_model: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copytree(clip_model, tmp_path / "model")
    (tmp_path / "model" / "dit_accel.json").write_text(text)
    error = error_of(film(tmp_path / "a.mp4", "--model", tmp_path / "model"))
    assert message in error
    assert "dit_accel.json" in error


# -- ffmpeg ---
def fake(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("kind", ["missing", "folder", "no program", "does nothing", "fails", "not installed"])
def test_broken_ffmpeg(
    film: Film, cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    exe = tmp_path / "bin"
    exe.mkdir()
    made = {
        "missing": lambda: exe / "nowhere",
        "folder": lambda: exe,
        "no program": lambda: fake(exe / "a", "\x7fELF"),
        "does nothing": lambda: fake(exe / "b", "#!/bin/sh\ncat > /dev/null\n"),
        "fails": lambda: fake(exe / "c", "#!/bin/sh\nexit 3\n"),
        "not installed": lambda: "",
    }[kind]()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(made))
    if kind == "not installed":
        monkeypatch.setattr("imageio_ffmpeg._utils._get_ffmpeg_exe", lambda: None)
    error = error_of(film(tmp_path / "a.mp4"))
    assert error.startswith("error: ffmpeg: ")
    assert "reinstall imageio-ffmpeg, unset IMAGEIO_FFMPEG_EXE, or write a .gif or .webp file" in error
    assert files(tmp_path) == {"bin"}
    found = {c["name"]: c for c in json.loads(cli("doctor", "--json").stdout)["checks"]}["ffmpeg"]
    assert (found["status"], "H.264" in found["found"] or "there is none" in found["found"]) == ("warn", True)


def test_gif_and_webp_need_no_ffmpeg(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nowhere"))
    for name in ("a.gif", "a.webp"):
        assert film(tmp_path / name).exit_code == 0


def test_ffmpeg_that_breaks_at_the_end_leaves_nothing(
    film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It worked in the trial; then the disk fills up, say, and fewer frames arrive than were sent."""
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda _: (2, 0.25))  # what the trial sends
    assert "it did not write what it was given" in error_of(film(tmp_path / "a.mp4"))
    assert files(tmp_path) == set()


# -- runs that break off ---
def test_interruption_in_a_run(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupt)
    result = film(tmp_path / "a.mp4")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "error: interrupted")
    assert files(tmp_path) == set()


def test_frames_that_are_not_finite(film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = AutoencoderKLWan.decode

    def poison(self: AutoencoderKLWan, *arguments: Any, **more: Any) -> Any:
        return (decode(self, *arguments, **more)[0] * math.nan,)

    monkeypatch.setattr(AutoencoderKLWan, "decode", poison)
    assert "the pixels hold NaN or Inf" in error_of(film(tmp_path / "a.mp4"))
    assert files(tmp_path) == set()
