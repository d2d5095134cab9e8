"""Pictures and clips that say how they were made, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError

from .media import Media, check_format, encode, read_text

MARKER = ".dit_accel"


def check_target(path: Path, force: bool) -> None:
    """Make sure that a picture or clip can be written to `path`, by trying; nothing is left behind.

    Raises ConfigError for an unknown extension, a clip that ffmpeg cannot write here, a folder that is missing or
    not writable, a file that exists.
    """
    check_format(path)
    if not path.parent.is_dir():
        raise ConfigError(f"output {path}: the folder {path.parent} does not exist; make it first.")
    with _as_config_error(path):
        _refuse_existing(path, force)
        with _temporary(path.parent):
            pass


def write(media: Media, path: Path, made_with: Mapping[str, Any], force: bool = False) -> None:
    """Write a picture or clip with its settings inside.

    A reader sees the whole file or none, and without `force` no existing file is replaced, whatever other
    processes do meanwhile. `made_with` must be plain data. Raises ConfigError where writing fails.
    """
    data = encode(media, path, json.dumps(made_with, allow_nan=False))
    with _as_config_error(path), _temporary(path.parent) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        _publish(temporary, path, force)


def read(path: Path) -> dict[str, Any]:
    """Return the settings written into a file; ConfigError where there are none, or no picture or clip."""
    text = read_text(path)
    try:
        made_with = json.loads(text)
    except (ValueError, RecursionError):
        made_with = None
    if not isinstance(made_with, dict):
        raise ConfigError(f"{path}: carries no settings written by dit_accel.")
    return made_with


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[Path, io.BufferedWriter]]:
    """Open a new file in `folder` that is gone afterwards, unless it was renamed."""
    path = folder / f"{MARKER}-{uuid.uuid4().hex}.part"
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
