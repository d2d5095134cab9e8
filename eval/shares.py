"""One study over several processes, GPUs or machines: what a share of it runs, and the joining of their rows."""

from __future__ import annotations

import lzma
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dit_accel.errors import ConfigError
from dit_accel.output import check_writable, write_whole

from .store import Row, Setup, line_of, load, media_folder, refuse_changes, refuse_definition

ROWS, PACKED = ".jsonl", ".jsonl.xz"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """The `index`-th of `count` shares, counted from 1; every candidate belongs to one of them."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read "3/16". Raises ConfigError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"share: is {text!r}; expected its number and how many there are, as 1/4 to 4/4.")
        return cls(int(match[1]), int(match[2]))

    def of(self, candidates: Sequence[Item]) -> list[Item]:
        """Return this share's, dealt in turn: neighbours, which cost about the same, go to different shares."""
        return list(candidates[self.index - 1 :: self.count])


WHOLE = Share()


def join(sources: Sequence[Path], output: Path, force: bool = False) -> list[Row]:
    """Write the rows of shares of one study into one file, and copy the pictures that are there beside it.

    Args:
        sources: files of rows, .jsonl or .jsonl.xz, of one setup. Of two rows of the same name, prompt and seed the
            first counts, one without an error before one with; so references, which each share draws, become one.
        output: .jsonl, with which a study may go on, or .jsonl.xz.
        force: whether a file there is replaced.

    Returns:
        The rows written: prompt by prompt as the first file has them, the reference first.

    Raises:
        ConfigError: a file that is none, another setup or definition, an output that cannot be.
    """
    if not output.name.endswith((ROWS, PACKED)):
        raise ConfigError(f"output {output}: rows are a {ROWS} or {PACKED} file.")
    if output.resolve() in [source.resolve() for source in sources]:
        raise ConfigError(f"output {output}: is one of the files to join; name another.")
    check_writable(output, force)
    setup, found = _gather(sources)
    prompts = list(dict.fromkeys((row.prompt, row.seed) for row, _ in found))
    found.sort(key=lambda one: (prompts.index((one[0].prompt, one[0].seed)), one[0].family != "reference"))
    taken: set[str] = set()
    rows = [_with_picture(row, source, output, taken) for row, source in found]
    data = b"".join(line_of(line) for line in (setup, *rows))
    if output.suffix == ".xz":
        data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    write_whole(data, output, force)
    return rows


def _gather(sources: Sequence[Path]) -> tuple[Setup, list[tuple[Row, Path]]]:
    """Return the setup, and each row with the file that it comes from."""
    setup: Setup | None = None
    kept: dict[tuple[str, str, int], tuple[Row, Path]] = {}
    for source in sources:
        own, rows = load(source)
        setup = setup or own
        refuse_changes(source, own, setup, "join the shares of one study only")
        for row in rows:
            known = kept.get(row.key)
            if known is not None:
                refuse_definition(source, row, known[0].definition, "join the shares of one study only")
            if known is None or (known[0].error and not row.error):
                kept[row.key] = row, source
    if setup is None:
        raise ConfigError("join: name at least one file of rows.")
    return setup, list(kept.values())


def _with_picture(row: Row, source: Path, output: Path, taken: set[str]) -> Row:
    """Copy a row's picture, under a name of its own where another row's has taken it."""
    file = media_folder(source) / (row.media or "")
    if row.media is None or not file.is_file():
        return row
    names = (f"{file.stem}{f'-{i}' if i else ''}{file.suffix}" for i in range(len(taken) + 1))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    media_folder(output).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, media_folder(output) / name)
    return row.model_copy(update={"media": name})
