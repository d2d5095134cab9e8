"""Tiles measured on the user's own GPU: a file per GPU in the user's cache folder, used in place of the committed ones.

`dit-accel tune-kernels` writes it. It is read once a process, at the first launch on a GPU, and used while it was
measured on a GPU of that name, with this Triton and on these very kernels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from .problem import Precision
from .tiles import Kind, Tile, power_of_two_part

KERNELS = ("triton.py", "quantised_triton.py", "quantised_pack.py")  # what was checked with a tile before it was timed
ADVICE = "dit-accel tune-kernels --reset removes it, and the committed tiles are used again"
Key = tuple[Precision, Kind, int, int, int]
Rows = Literal[16, 32, 64, 128]
Positive = Annotated[float, Field(gt=0, strict=False)]
Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    pass


class Shape(_Strict):
    """A `Tile` as the file holds it."""

    q: Rows
    k: Rows
    warps: Literal[1, 2, 4, 8]
    stages: Literal[1, 2, 3, 4, 5, 6]
    tma: bool
    pack: bool


class Entry(_Strict):
    """One measured choice: the calls it is for (as `tiles.HOPPER` tells them apart), and times of old and new tile.

    `block_q` and `block_k` are the powers of two in the list's blocks; `error` is the relative one of its check.
    """

    precision: Precision
    kind: Kind
    dim: Literal[16, 32, 64, 128, 256]
    block_q: Rows
    block_k: Rows
    tile: Shape
    ms: Positive
    before_ms: Annotated[float, Field(gt=0, strict=False)] | None
    error: Annotated[float, Field(ge=0, strict=False)]

    @model_validator(mode="after")
    def _fits(self) -> Entry:
        if self.tile.q > self.block_q or self.tile.k > self.block_k:
            raise ValueError(f"tile: {self.tile.q} x {self.tile.k} is larger than its blocks")
        return self

    @property
    def key(self) -> Key:
        return (self.precision, self.kind, self.dim, self.block_q, self.block_k)


class Table(_Strict):
    """The whole file: where and with what it was measured (`kernels` is a hash of their source), and the tiles."""

    format: Literal[1]
    gpu: Text
    capability: tuple[int, int]
    torch: Text
    triton: Text
    dit_accel: Text
    commit: str
    date: Text
    kernels: Text
    tiles: tuple[Entry, ...]

    def misfit(self, gpu: str) -> str:
        """Say why this table does not speak for a GPU here and now; '' where it does."""
        here = {"gpu": gpu, "triton": triton_version(), "kernels": source_hash()}
        was = {name: getattr(self, name) for name in here}
        return "; ".join(f"{name} was {was[name]}, is {now}" for name, now in here.items() if was[name] != now)

    def by_key(self) -> dict[Key, Tile]:
        return {entry.key: Tile(**entry.tile.model_dump()) for entry in self.tiles}


def path(gpu: str) -> Path:
    """Return where the table of a GPU lies: in XDG_CACHE_HOME, else in ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dit_accel" / "tiles" / f"{'-'.join(gpu.lower().split())}.json"


def read(file: Path) -> Table | None:
    """Read a table; None where there is no file. Raises ValueError that names the field of a malformed one."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Table.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{file}: {field}: {first['msg'].lower()}, got {first['input']!r:.80}; {ADVICE}") from None


def write(table: Table, file: Path) -> None:
    """Write a table, by way of a second file so that a half-written one is never left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f"{file.name}.{os.getpid()}.part")
    half.write_text(table.model_dump_json(indent=1) + "\n", encoding="utf-8")
    half.replace(file)


def tile_for(
    device: torch.device, precision: Precision, kind: Kind, padded_dim: int, block_q: int, block_k: int
) -> Tile | None:
    """Return the measured tile for calls in half precision on a device; None where none was measured."""
    key = (precision, kind, padded_dim, power_of_two_part(block_q), power_of_two_part(block_k))
    return tiles(device).get(key)


@cache
def tiles(device: torch.device) -> Mapping[Key, Tile]:
    """Return all measured tiles that fit a device; raises ValueError where its file is malformed."""
    gpu = gpu_name(device)
    table = read(path(gpu)) if gpu else None
    return {} if table is None or table.misfit(gpu) else table.by_key()


def forget() -> None:
    """Let the file be read again."""
    tiles.cache_clear()


def gpu_name(device: torch.device) -> str:
    """Return the GPU's name; '' for what is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def triton_version() -> str:
    """Return the installed Triton's version; 'none' without one."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@cache
def source_hash() -> str:
    """Return a short hash of the kernels' source: another kernel was not checked with these tiles."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in KERNELS)).hexdigest()[:16]
