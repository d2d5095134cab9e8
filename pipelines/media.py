"""Pictures and clips as files: which names stand for which, how they are encoded, and the text inside them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from dit_accel.errors import ConfigError, nearest

from . import ffmpeg
from .settings import MOST_FPS

KEY = "dit_accel"
READ_LIMIT = 256 << 20
_SAMPLE = 256  # pixels a side of the frames that a GIF's palette is made from
_EXIF_ASCII = b"ASCII\0\0\0"
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Media:
    """A picture, or a clip of frames of one size at `fps` frames a second (None for a picture)."""

    frames: tuple[Image.Image, ...]
    fps: float | None = None

    @classmethod
    def picture(cls, image: Image.Image) -> Media:
        """Return a picture."""
        return cls((image,))

    @property
    def is_clip(self) -> bool:
        return self.fps is not None

    @property
    def image(self) -> Image.Image:
        """The picture, or the first frame of a clip."""
        return self.frames[0]


@dataclass(frozen=True)
class Format:
    """What a file name's ending stands for."""

    picture: bool
    clip: bool
    encode: Callable[[Media, str], bytes]
    most_fps: float = MOST_FPS


def format_of(path: Path) -> Format:
    """Return the format that a file's name asks for; ConfigError where there is none of that name."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(
            f"output {path}: no picture or clip format is called {path.suffix!r}.{nearest(path.suffix, FORMATS)}"
        )
    return FORMATS[suffix]


def check_format(path: Path) -> None:
    """Make sure that a file of this name can be encoded here; ConfigError where ffmpeg is needed and does not work."""
    if format_of(path).encode is _mp4:
        ffmpeg.check()


def check_fits(path: Path, clip: bool, maker: str) -> None:
    """Raise ConfigError where `maker` makes clips and the name asks for a picture, or the reverse."""
    wanted = format_of(path)
    if clip and not wanted.clip:
        raise ConfigError(f"output {path}: {maker} makes clips; name a {_endings(clip=True)} file.")
    if not clip and not wanted.picture:
        raise ConfigError(
            f"output {path}: {maker} makes pictures; name a {_endings(clip=False)} file, or a video model with --model."
        )


def check_fps(path: Path, fps: float) -> None:
    """Raise ConfigError where a format cannot play that fast."""
    most = format_of(path).most_fps
    if fps > most:
        raise ConfigError(f"fps: {path.suffix} takes at most {most:g} frames a second, got {fps:g}.")


def encode(media: Media, path: Path, text: str) -> bytes:
    """Return the bytes of a file named `path` that holds the media and, as metadata, an ASCII text."""
    return format_of(path).encode(media, text)


def stored_size(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) a file holds for media of `size`: H.264 takes even sides, so odd ones grow by one."""
    return _even(size) if format_of(path).encode is _mp4 else size


def read_text(path: Path) -> str:
    """Return the text that `encode` put into a file, '' where there is none.

    Raises ConfigError where the file is missing, too large, or neither picture nor clip.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file.")
    try:
        if path.stat().st_size > READ_LIMIT:
            raise ConfigError(f"{path}: larger than {READ_LIMIT >> 20} MiB, this is none of our files.")
        if _is_mp4(path):
            return ffmpeg.comment_of(path)
        with Image.open(path) as image:
            return _text_of(image)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: is no picture or clip that can be read ({error}).") from None


def _png(media: Media, text: str) -> bytes:
    info = PngInfo()
    info.add_text("Software", KEY)
    info.add_text(KEY, text)
    return _saved(media.image, "PNG", pnginfo=info)


def _jpeg(media: Media, text: str) -> bytes:
    return _saved(media.image, "JPEG", quality=95, exif=_exif(text))


def _webp(media: Media, text: str) -> bytes:
    return _saved(media.image, "WEBP", quality=95, exif=_exif(text), **_animation(media, tick=1))


def _gif(media: Media, text: str) -> bytes:
    """Encode with one palette for all frames: Pillow's own, made anew for each, flicker and take long."""
    frames = [frame.convert("RGB") for frame in media.frames]
    size = (min(frames[0].width, _SAMPLE), min(frames[0].height, _SAMPLE))
    few = [np.asarray(frame.resize(size, Image.Resampling.NEAREST)) for frame in frames[:: -(-len(frames) // 8)]]
    palette = Image.fromarray(np.concatenate(few)).quantize(256, Image.Quantize.MEDIANCUT)
    shown = tuple(frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    animation = _animation(Media(shown, media.fps), tick=10)
    return _saved(shown[0], "GIF", comment=text.encode("ascii"), **animation)


def _mp4(media: Media, text: str) -> bytes:
    assert media.fps is not None
    width, height = _even(media.image.size)
    extra = ((0, height - media.image.height), (0, width - media.image.width), (0, 0))
    frames = (np.pad(np.asarray(frame.convert("RGB")), extra, mode="edge") for frame in media.frames)
    return ffmpeg.encode(frames, (width, height), media.fps, text)


FORMATS = {
    ".png": Format(picture=True, clip=False, encode=_png),
    ".jpg": Format(picture=True, clip=False, encode=_jpeg),
    ".jpeg": Format(picture=True, clip=False, encode=_jpeg),
    ".webp": Format(picture=True, clip=True, encode=_webp),
    ".gif": Format(picture=False, clip=True, encode=_gif, most_fps=50),  # players slow shorter delays down
    ".mp4": Format(picture=False, clip=True, encode=_mp4),
}


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except ValueError as error:  # a prompt that is longer than what EXIF holds
        raise ConfigError(f"output: {error}; PNG takes longer texts.") from None
    return buffer.getvalue()


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _EXIF_ASCII + text.encode("ascii")
    return exif


def _animation(media: Media, tick: int) -> dict[str, Any]:
    """Return Pillow's options for a clip, none for a picture; `tick` ms is the unit of the format's delays.

    The delays are rounded such that each frame starts within half a tick of its time.
    """
    if media.fps is None:
        return {}
    starts = [round(i * 1000 / media.fps / tick) * tick for i in range(len(media.frames) + 1)]
    delays = [after - before for before, after in pairwise(starts)]
    return {"save_all": True, "append_images": media.frames[1:], "duration": delays, "loop": 0}


def _even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def _endings(clip: bool) -> str:
    names: Sequence[str] = sorted(name for name, kind in FORMATS.items() if (kind.clip if clip else kind.picture))
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _text_of(image: Image.Image) -> str:
    if image.format == "PNG":
        return str(image.info.get(KEY, ""))
    if image.format == "GIF":
        comment = image.info.get("comment", b"")
    else:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(comment, bytes):
        return ""
    return comment.removeprefix(_EXIF_ASCII).decode("ascii", errors="replace")
