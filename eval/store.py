"""The rows of a study on disk: one JSON object a line, appended whole, read back strictly, resumed or refused."""

from __future__ import annotations

import json
import lzma
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from dit_accel.errors import ConfigError
from dit_accel.pipelines.media import Media

FORMAT = 1
DIGITS = 6
Family = Literal["reference", "floor", "recipe", "oracle", "steps", "cache"]


class Line(BaseModel, frozen=True, extra="forbid"):
    """Base of what a line of the file holds."""


class Setup(Line, frozen=True):
    """The first line: all that must not change within a file, because figures would not compare.

    `device` names what the wall times were taken on; `settings` are the pipeline's, seed aside; `versions` of torch,
    diffusers and dit_accel. `batch`: how many were made at once, of which seconds and bytes are.
    """

    format: int = FORMAT
    model: str
    settings: Mapping[str, Any]
    dtype: str
    device: str
    dense_steps: float
    dense_layers: int
    batch: int = 1
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def timed_on(self) -> str:
        """What wall times are of: the device, and how many were made at once where it is not one."""
        return self.device if self.batch == 1 else f"{self.device}, {self.batch} at once"


class Figures(Line, frozen=True):
    """How a picture or clip differs from the reference; what a figure means stands in `eval/metrics.py`.

    `psnr` is None where nothing differs. What does not apply, or whose package is missing, is None.
    """

    psnr: float | None
    ssim: float
    ms_ssim: float | None = None
    flip: float | None = None
    temporal_error: float | None = None
    vmaf: float | None = None
    frame_psnr: tuple[float | None, ...] = ()
    frame_ssim: tuple[float, ...] = ()


class Sample(Line, frozen=True):
    """One attention call that was looked at: recall, what the best choice of as many pairs would keep, output error.

    The first two are None where they mean nothing, as of an operator.
    """

    step: int
    site: str
    density: float
    recall: float | None
    best_recall: float | None
    error: float


class DensityMap(Line, frozen=True):
    """Computed over possible pairs by step and attention site, [steps][sites]; dense calls are 1."""

    sites: tuple[str, ...]
    density: tuple[tuple[float, ...], ...]


class Row(Line, frozen=True):
    """One picture or clip: what made it, from which prompt and seed, what was measured.

    `seconds` is the wall time of the pipeline's call, `peak_bytes` the most memory held in it (CUDA: by torch's
    allocator; CPU: resident, of the whole process). `error` says why there is nothing, then all figures are None.
    """

    candidate: str
    family: Family
    definition: Mapping[str, Any]
    prompt: str
    seed: int
    asked: float | None = None
    steps: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    density: float | None = None
    overall_density: float | None = None
    state_bytes: int | None = None
    figures: Figures | None = None
    map: DensityMap | None = None
    samples: tuple[Sample, ...] = ()
    media: str | None = None
    fps: float | None = None
    frames: int | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        return self.candidate, self.prompt, self.seed

    @property
    def passing(self) -> bool:
        """Whether it failed for want of memory, which may be there another time."""
        return self.error is not None and "out of memory" in self.error


class Store:
    """A study's file, and beside it a folder of the pictures. Opening one with another setup is refused."""

    def __init__(self, path: Path, setup: Setup) -> None:
        self.path, self.setup = path, setup
        self.rows: dict[tuple[str, str, int], Row] = {}
        if path.exists() and path.stat().st_size:
            known, rows = load(path)
            refuse_changes(path, known, setup, "name another output, or remove it")
            self.rows = {row.key: row for row in rows}
            _drop_half_line(path)

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return media_folder(self.path)

    def has(self, candidate: str, definition: Mapping[str, Any], prompt: str, seed: int) -> bool:
        """Say whether a row is there already, one to try again aside; ConfigError where its name stood for others."""
        row = self.rows.get((candidate, prompt, seed))
        if row is not None:
            refuse_definition(self.path, row, definition, "name another output")
        return row is not None and not row.passing

    def add(self, row: Row) -> None:
        """Append a row; what is written before it, the setup for instance, is never touched again."""
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, self.setup)
        _append(self.path, row)
        self.rows[row.key] = row

    def keep(self, media: Media, candidate: str, prompt: str, seed: int) -> str:
        """Write the frames below each other into one lossless PNG; return its name in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.@=-]+", "-", f"{candidate}-{prompt}-{seed}")
        taken = {row.media for row in self.rows.values()}
        name = next(n for i in range(len(taken) + 1) if (n := f"{stem}{f'-{i}' if i else ''}.png") not in taken)
        strip = np.concatenate([np.asarray(frame.convert("RGB")) for frame in media.frames])
        half = self.folder / f"{name}.part"
        Image.fromarray(strip).save(half, "PNG", compress_level=1)  # a clip of 81 frames: half the time, a quarter more
        half.replace(self.folder / name)
        return name


def load(path: Path) -> tuple[Setup, list[Row]]:
    """Read a file of rows, .jsonl or .jsonl.xz, the last of each key. Raises ConfigError.

    A last line left unfinished is passed over.
    """
    lines = _text(path).split("\n")[:-1]  # what follows the last newline is nothing, or half a row
    if not lines:
        raise ConfigError(f"{path}: holds no rows.")
    setup = _parse(Setup, lines[0], path, 1)
    if setup.format != FORMAT:
        raise ConfigError(f"{path}: has format {setup.format}, this version reads {FORMAT}.")
    rows = [_parse(Row, line, path, number) for number, line in enumerate(lines[1:], 2)]
    return setup, list({row.key: row for row in rows}.values())


def is_cut(path: Path) -> bool:
    """Say whether a file of rows ends in an unfinished line, which `load` passes over. Raises ConfigError."""
    return not _text(path).endswith("\n")


def open_media(rows: Path, row: Row) -> Media | None:
    """Return the picture or clip of a row, None where its file is gone."""
    file = media_folder(rows) / (row.media or "")
    if row.media is None or not file.is_file():
        return None
    with Image.open(file) as image:
        strip = np.asarray(image.convert("RGB"))
    return Media(tuple(Image.fromarray(part) for part in np.split(strip, row.frames or 1)), row.fps)


def media_folder(rows: Path) -> Path:
    """Return the folder of the pictures of a file of rows."""
    return rows.with_name(f"{rows.stem}-media")


def refuse_changes(path: Path, known: Setup, asked: Setup, advice: str) -> None:
    """Raise ConfigError where a file's setup is another one than asked for; notes may differ."""
    changed = _changed(_plain(known.model_dump(exclude={"notes"})), _plain(asked.model_dump(exclude={"notes"})))
    if changed:
        raise ConfigError(f"{path}: holds rows of another study ({changed}); {advice}.")


def refuse_definition(path: Path, row: Row, definition: Mapping[str, Any], advice: str) -> None:
    """Raise ConfigError where a row's name stood for another definition."""
    changed = _changed(_plain(row.definition), _plain(definition))
    if changed:
        raise ConfigError(f"{path}: {row.candidate} was measured with other settings ({changed}); {advice}.")


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def _parse(kind: Any, line: str, path: Path, number: int) -> Any:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "line"
        raise ConfigError(f"{path}, line {number}: is no row of a study ({where}: {first['msg'].lower()}).") from None


def line_of(line: Line) -> bytes:
    """Return it as it stands in a file."""
    return (json.dumps(_short(line.model_dump(mode="json")), allow_nan=False) + "\n").encode()


def _append(path: Path, line: Line) -> None:
    data = line_of(line)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, data) != len(data):
            raise OSError(f"{path}: the disk took only a part of a row")
        os.fsync(file)
    finally:
        os.close(file)


def _short(data: Any) -> Any:
    """Keep as many digits as mean anything: a study holds thousands of numbers a row."""
    if isinstance(data, float):
        return float(f"{data:.{DIGITS}g}")
    if isinstance(data, dict):
        return {key: _short(value) for key, value in data.items()}
    return [_short(value) for value in data] if isinstance(data, list) else data


def _drop_half_line(path: Path) -> None:
    """Cut off what a killed run left behind, so that the next row begins on a line of its own."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Name what differs, innermost settings first: 'settings.steps: 4 there, 8 here'."""
    parts = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts.append(_changed(a, b, f"{prefix}{key}."))
        elif a != b:
            parts.append(f"{prefix}{key}: {a} there, {b} here")
    return "; ".join(part for part in parts if part)
