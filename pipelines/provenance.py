"""Pictures that say how they were made, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from dit_accel.errors import ConfigError, nearest

KEY = "dit_accel"
READ_LIMIT = 256 << 20
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_EXIF_ASCII = b"ASCII\0\0\0"
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def check_target(path: Path, force: bool) -> None:
    """Make sure that a picture can be written to `path`, by trying; nothing is left behind.

    Raises ConfigError for an unknown extension, a folder that is missing or not writable, a file that exists.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"output {path}: no picture format is called {path.suffix!r}.{nearest(path.suffix, _FORMATS)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"output {path}: the folder {path.parent} does not exist; make it first.")
    with _as_config_error(path):
        _refuse_existing(path, force)
        with _temporary(path.parent):
            pass


def write(image: Image.Image, path: Path, made_with: Mapping[str, Any], force: bool = False) -> None:
    """Write a picture with its settings inside.

    A reader sees the whole file or none, and without `force` no existing file is replaced, whatever other
    processes do meanwhile. `made_with` must be plain data. Raises ConfigError where writing fails.
    """
    data = _encode(image, path, json.dumps(made_with, allow_nan=False))
    with _as_config_error(path), _temporary(path.parent) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        _publish(temporary, path, force)


def read(path: Path) -> dict[str, Any]:
    """Return the settings written into a picture; ConfigError where there is none, or no picture."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file.")
    try:
        if path.stat().st_size > READ_LIMIT:
            raise ConfigError(f"{path}: larger than {READ_LIMIT >> 20} MiB, this is none of our pictures.")
        with Image.open(path) as image:
            text = _text_of(image)
    except _UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is no picture that can be read ({error}).") from None
    try:
        made_with = json.loads(text)
    except (ValueError, RecursionError):
        made_with = None
    if not isinstance(made_with, dict):
        raise ConfigError(f"{path}: carries no settings written by dit_accel.")
    return made_with


def _encode(image: Image.Image, path: Path, text: str) -> bytes:
    kind = _FORMATS[path.suffix.lower()]
    buffer = io.BytesIO()
    if kind == "PNG":
        info = PngInfo()
        info.add_text("Software", "dit_accel")
        info.add_text(KEY, text)
        image.save(buffer, kind, pnginfo=info)
        return buffer.getvalue()
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _EXIF_ASCII + text.encode("ascii")
    try:
        image.save(buffer, kind, quality=95, exif=exif)
    except ValueError as error:  # a prompt that is longer than what EXIF holds
        raise ConfigError(f"output {path}: {error}; PNG takes longer texts.") from None
    return buffer.getvalue()


def _text_of(image: Image.Image) -> str:
    if image.format == "PNG":
        return str(image.info.get(KEY, ""))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if not isinstance(comment, bytes):
        return ""
    return comment.removeprefix(_EXIF_ASCII).decode("ascii", errors="replace")


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, io.BufferedWriter]]:
    """Open a new file in `folder` that is gone afterwards, unless it was renamed."""
    path = folder / f".{KEY}-{uuid.uuid4().hex}.part"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first, then fill it
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, path)


def _refuse_existing(path: Path, force: bool) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    if path.is_dir():
        raise ConfigError(f"output {path}: is a folder.")
    if not force:
        raise FileExistsError


@contextmanager
def _as_config_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise ConfigError(f"output {path}: exists already; --force overwrites it.") from None
    except OSError as error:
        raise ConfigError(f"output {path}: cannot be written ({error.strerror or error}).") from None
