"""H.264 through the ffmpeg of imageio-ffmpeg: frames in, a whole mp4 file out, and its comment back."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dit_accel.errors import ConfigError

COMMENT_LIMIT = 100_000  # a command-line argument holds little more
TRIAL_SECONDS, READ_SECONDS = 20, 60
ADVICE = "(reinstall imageio-ffmpeg, unset IMAGEIO_FFMPEG_EXE, or write a .gif or .webp file)"
# swscale's own choice is BT.601 without saying so, which players show with wrong colours at larger sizes
_COLOR = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
_QUALITY = ["-crf", "17", "-preset", "medium", "-movflags", "+faststart"]
Frame = npt.NDArray[np.uint8]


def encode(frames: Iterable[Frame], size: tuple[int, int], fps: float, comment: str, wait: float = 0) -> bytes:
    """Return an mp4 file of frames uint8 [height, width, 3]; `size` is (width, height), both even.

    `wait` seconds after the last frame a hanging ffmpeg is killed (0: never). Raises ConfigError where ffmpeg is
    missing or broken, or the comment too long.
    """
    executable()
    import imageio_ffmpeg

    if len(comment) > COMMENT_LIMIT:
        raise ConfigError(f"mp4: its metadata holds {COMMENT_LIMIT} characters, these are {len(comment)}.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        writing = imageio_ffmpeg.write_frames(
            file,
            size,
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=1,  # sizes are even already; ffmpeg's own way out would stretch the picture
            ffmpeg_log_level="fatal",
            ffmpeg_timeout=wait,
            output_params=["-vf", _COLOR, *_QUALITY, "-metadata", f"comment={comment}"],
        )
        try:
            sent = 0
            with closing(writing) as writer:
                writer.send(None)
                for frame in frames:
                    writer.send(np.ascontiguousarray(frame).tobytes())
                    sent += 1
            if not file.is_file() or imageio_ffmpeg.count_frames_and_secs(file)[0] != sent:
                raise OSError("it did not write what it was given")
            return file.read_bytes()
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"ffmpeg: it cannot write H.264 ({_reason(error)}) {ADVICE}.") from None


def check() -> str:
    """Make sure, by trying, that ffmpeg can write a clip; return where it lies. Raises ConfigError."""
    encode([np.zeros((16, 16, 3), np.uint8)] * 2, (16, 16), 8, "trial", TRIAL_SECONDS)
    return executable()


def executable() -> str:
    """Return the path of ffmpeg; ConfigError where there is none."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"ffmpeg: there is none ({_reason(error)}) {ADVICE}.") from None


def comment_of(file: Path) -> str:
    """Return the comment of an mp4 file, '' where it has none; ConfigError where ffmpeg cannot read it."""
    # named as a file, since a bare name such as "concat:a" or "-i" would mean something else to ffmpeg
    command = [executable(), "-v", "error", "-f", "mov", "-i", f"file:{file}", "-f", "ffmetadata", "-"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"ffmpeg: it cannot be run to read {file} ({_reason(error)}).") from None
    if done.returncode:
        reason = next(iter(done.stderr.decode(errors="replace").strip().splitlines()), "no reason given")
        raise ConfigError(f"{file}: is no clip that ffmpeg can read ({reason}).")
    tags = done.stdout.decode(errors="replace").splitlines()
    escaped = next((tag.removeprefix("comment=") for tag in tags if tag.startswith("comment=")), "")
    return re.sub(r"\\(.)", r"\1", escaped)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
