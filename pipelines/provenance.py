"""Pictures and clips that say how they were made, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.output import check_writable, write_whole

from .media import Media, check_format, encode, read_text


def check_target(path: Path, force: bool) -> None:
    """Make sure that a picture or clip can be written to `path`, by trying; nothing is left behind.

    Raises ConfigError for an unknown extension, a clip that ffmpeg cannot write here, a folder that is missing or
    not writable, a file that exists.
    """
    check_format(path)
    check_writable(path, force)


def write(media: Media, path: Path, made_with: Mapping[str, Any], force: bool = False) -> None:
    """Write a picture or clip with its settings inside.

    A reader sees the whole file or none, and without `force` no existing file is replaced, whatever other
    processes do meanwhile. `made_with` must be plain data. Raises ConfigError where writing fails.
    """
    write_whole(encode(media, path, json.dumps(made_with, allow_nan=False)), path, force)


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
