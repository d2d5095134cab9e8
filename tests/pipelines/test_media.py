"""Files: their bytes hold the frames, the timing and the text that went in."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from dit_accel.errors import ConfigError
from dit_accel.pipelines import ffmpeg, media
from dit_accel.pipelines.media import Media, encode, read_text, stored_size
from dit_accel.pipelines.provenance import check_target, read, write

TEXT = '{"prompt": "a=b;c#d\\\\e\\n \\u00f1 \\ud83c\\udf2e %s {0} -i file:"}'


def ramp(frames: int, width: int = 48, height: int = 32, fps: float = 8.0) -> Media:
    """Draw a bright bar that moves over a ramp of grey, so that every frame differs."""
    made = []
    for i in range(frames):
        pixels = np.tile(np.linspace(0, 120, width), (height, 1))[..., None].repeat(3, -1)
        pixels[:, i % width] = 240
        made.append(Image.fromarray(pixels.astype(np.uint8)))
    return Media(tuple(made), fps)


def decoded(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    reader: Iterator[Any] = imageio_ffmpeg.read_frames(path)
    facts = next(reader)
    width, height = facts["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]), facts


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.gif", "a.mp4", "A.MP4"])
@pytest.mark.parametrize("frames", [1, 3])
def test_text_survives(tmp_path: Path, name: str, frames: int) -> None:
    path = tmp_path / name
    shown = ramp(frames) if media.format_of(path).clip else Media.picture(ramp(1).image)
    path.write_bytes(encode(shown, path, TEXT))
    assert read_text(path) == TEXT


@pytest.mark.parametrize("size", [(48, 32), (47, 32), (48, 31), (47, 31), (1, 1), (2, 3)])
def test_mp4_keeps_every_pixel_of_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.mp4"
    shown = ramp(3, *size)
    path.write_bytes(encode(shown, path, "{}"))
    frames, facts = decoded(path)
    assert facts["size"] == stored_size(path, size) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert facts["codec"] == "h264"
    assert "yuv420p" in facts["pix_fmt"]
    assert "bt709" in facts["pix_fmt"]
    width, height = size
    for frame, expected in zip(frames, shown.frames, strict=True):
        exact = np.asarray(expected, float)
        assert np.abs(frame[:height, :width] - exact).mean() < 4
        grown = np.pad(exact, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        assert np.abs(frame - grown).mean() < 4


def test_colours_of_mp4_are_right(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (0, 0, 0), (255, 255, 255)]
    shown = Media(tuple(Image.new("RGB", (32, 32), colour) for colour in colours), 4)
    (tmp_path / "a.mp4").write_bytes(encode(shown, tmp_path / "a.mp4", "{}"))
    frames, _ = decoded(tmp_path / "a.mp4")
    assert np.abs(frames.mean((1, 2)) - np.array(colours)).max() < 5


@pytest.mark.parametrize("frames", [2, 257])
@pytest.mark.parametrize("fps", [1, 8, 23.976, 50, 120])
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_frames_and_timing(tmp_path: Path, suffix: str, fps: float, frames: int) -> None:
    path = tmp_path / f"a{suffix}"
    shown = ramp(frames, width=300, height=4, fps=fps)
    path.write_bytes(encode(shown, path, "{}"))
    if suffix == ".mp4":
        found, facts = decoded(path)
        assert len(found) == frames
        assert facts["fps"] == pytest.approx(fps, abs=0.01)
        return
    tick = 10 if suffix == ".gif" else 1
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == frames
        assert image.info.get("loop") == 0
        start = 0.0
        for i in range(frames):
            assert start == pytest.approx(1000 * i / fps, abs=tick / 2)
            image.seek(i)
            image.load()
            start += image.info["duration"]


def test_gif_speed_has_a_limit() -> None:
    media.check_fps(Path("a.gif"), 50)
    with pytest.raises(ConfigError, match=r"fps: \.gif takes at most 50 frames a second, got 51"):
        media.check_fps(Path("a.gif"), 51)


def test_frames_of_a_gif_that_stand_still_play_as_long(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(encode(Media((Image.new("RGB", (8, 8)),) * 4, 8), path, "{}"))
    with Image.open(path) as image:
        assert image.info["duration"] == 500


def test_text_that_no_mp4_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its metadata holds 100000 characters"):
        write(ramp(2), tmp_path / "a.mp4", {"prompt": "x" * 200_000})
    assert list(tmp_path.iterdir()) == []
    write(ramp(2), tmp_path / "a.gif", {"prompt": "x" * 200_000})
    assert read(tmp_path / "a.gif") == {"prompt": "x" * 200_000}


def test_longest_text_an_mp4_takes(tmp_path: Path) -> None:
    text = "x" * ffmpeg.COMMENT_LIMIT
    (tmp_path / "a.mp4").write_bytes(encode(ramp(2), tmp_path / "a.mp4", text))
    assert read_text(tmp_path / "a.mp4") == text


def _foreign(path: Path) -> None:
    path.write_bytes(encode(ramp(2), path, ""))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"garbage"), "is no picture or clip"),
        (lambda path: path.write_bytes(b"\0\0\0\x20ftypisom" + b"\xff" * 100), "is no clip that ffmpeg can read"),
        (lambda path: path.write_bytes(encode(ramp(2), path, "{}")[:300]), "a.mp4"),
        (_foreign, "carries no settings"),
    ],
)
def test_reading_clips_that_are_not_ours(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_reading_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(ramp(2), tmp_path / "a.mp4", {})
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(ConfigError, match="ffmpeg: it cannot be run to read"):
        read(tmp_path / "a.mp4")


def test_names_that_mean_something_to_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-i.mp4", "concat:a.mp4", "a%03d.mp4", "pipe:1.mp4"):
        check_target(Path(name), force=False)
        write(ramp(2), Path(name), {"name": name})
        assert read(Path(name)) == {"name": name}


def test_failing_write_leaves_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg.tempfile, "tempdir", str(tmp_path))

    def frames() -> Iterator[np.ndarray]:
        yield np.zeros((16, 16, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ffmpeg.encode(frames(), (16, 16), 8, "")
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_other_modes(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif", "a.webp"):
        write(Media((Image.new("L", (9, 7), 100), Image.new("L", (9, 7), 200)), 8), tmp_path / name, {})
    frames, _ = decoded(tmp_path / "a.mp4")
    assert [round(float(frame.mean()), -1) for frame in frames] == [100, 200]
    assert Image.open(io.BytesIO((tmp_path / "a.gif").read_bytes())).size == (9, 7)
