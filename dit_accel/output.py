"""Files that are written whole or not at all, and never over another one unasked."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError

MARKER = ".dit_accel"


def check_writable(path: Path, force: bool) -> None:
    """Make sure that a file can be written to `path`, by trying; nothing is left behind.

    Raises ConfigError for a folder that is missing or not writable, and a file that exists, unless `force`.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"output {path}: the folder {path.parent} does not exist; make it first.")
    with _as_config_error(path):
        _refuse_existing(path, force)
        with _temporary(path.parent):
            pass


def write_whole(data: bytes, path: Path, force: bool = False) -> None:
    """Write a file.

    A reader sees the whole file or none, and without `force` no existing file is replaced, whatever other
    processes do meanwhile. Raises ConfigError where writing fails.
    """
    with _as_config_error(path), _temporary(path.parent) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        _publish(temporary, path, force)


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
