"""What `make demo` shows: a few prompts, stock and accelerated, side by side in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.table import Table

from dit_accel.errors import ConfigError
from dit_accel.report import Report

from .compare import Cell, Likeness, sheet
from .generate import Accelerated, Generation, Settings, generate, generate_stock
from .loading import DEFAULT_MODEL, choose_device, choose_dtype, load, locate
from .provenance import check_target, read, write
from .screen import OneLineErrors, screen

PROMPTS = (
    "watermelon, fluent flat style",
    "maple leaf, noto style",
    "wine glass, twemoji style",
    "monkey face, fluent 3d style",
)
RECIPE, DENSITIES = "draft", (0.5, 0.3)
SHEET = "side-by-side.png"
MARK = "demo"  # in the metadata of what this module wrote, and may therefore write again

app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Shown:
    """One prompt: its stock picture and one accelerated picture for each density."""

    prompt: str
    stock: Generation
    made: Sequence[Accelerated]

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield file names and pictures."""
        pictures = [self.stock.image, *(made.image for made in self.made)]
        return zip(_names(self.prompt), pictures, strict=True)

    def cells(self) -> list[Cell]:
        """Return the row of the sheet."""
        row = [Cell(self.stock.image, [self.prompt, f"stock, {self.stock.seconds:.2f} s"])]
        for made in self.made:
            alike = Likeness.of(self.stock.image, made.image)
            lines = [f"density {made.report.density:.2f}, {made.seconds:.2f} s", str(alike)]
            row.append(Cell(made.image, lines))
        return row


@app.callback(invoke_without_command=True)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Shipped model, folder, or Hub id.")] = DEFAULT_MODEL,
    quick: Annotated[bool, typer.Option("--quick", help="One prompt, a few steps.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw a few prompts, stock and accelerated, and say where the pictures lie."""
    prompts = PROMPTS[:1] if quick else PROMPTS
    out.mkdir(parents=True, exist_ok=True)
    for name in (SHEET, *(name for prompt in prompts for name in _names(prompt))):
        check_target(out / name, force=_is_ours(out / name))
    device = choose_device("auto")
    pipe = load(locate(model), choose_dtype(None, device), device)
    settings = _settings(device, quick)
    shown = [_show(pipe, prompt, settings) for prompt in prompts]
    for row in shown:
        for name, picture in row.pictures():
            _write(picture, out / name, {"prompt": row.prompt, **row.stock.settings})
    _write(sheet([row.cells() for row in shown]), out / SHEET, {"prompts": [row.prompt for row in shown]})
    console = screen()
    console.print(_table(shown))
    for report in _last_reports(shown):
        console.print(report)
    print(f"pictures: {out.resolve()}\nside by side: {(out / SHEET).resolve()}")


def _settings(device: torch.device, quick: bool) -> Settings:
    """Return the size and steps that a machine draws in good time: a CPU stays at 128 pixels."""
    size = 128 if device.type == "cpu" else 256
    return Settings(steps=4 if quick else 20, height=size, width=size, text_length=32)


def _names(prompt: str) -> list[str]:
    stem = prompt.replace(",", "").replace(" ", "-")
    return [f"{stem}-stock.png", *(f"{stem}-density-{density}.png" for density in DENSITIES)]


def _show(pipe: Any, prompt: str, settings: Settings) -> Shown:
    pipe.set_progress_bar_config(desc=f"{prompt}: stock")
    stock = generate_stock(pipe, prompt, settings=settings, warm_up=True)
    made = []
    for density in DENSITIES:
        pipe.set_progress_bar_config(desc=f"{prompt}: density {density}")
        asked = {"density": density}
        made.append(generate(pipe, prompt, recipe=RECIPE, overrides=asked, settings=settings, warm_up=True))
    return Shown(prompt, stock, made)


def _table(shown: Sequence[Shown]) -> Table:
    table = Table(title=f"recipe {RECIPE}, same seed", box=None, padding=(0, 2))
    for column in ("prompt", "stock", *(f"density {density}" for density in DENSITIES)):
        table.add_column(column)
    for row in shown:
        made = (f"{m.seconds:.2f} s, {Likeness.of(row.stock.image, m.image)}" for m in row.made)
        table.add_row(row.prompt, f"{row.stock.seconds:.2f} s", *made)
    return table


def _last_reports(shown: Sequence[Shown]) -> list[Report]:
    return [made.report for made in shown[-1].made]


def _write(picture: Image.Image, path: Path, made_with: dict[str, Any]) -> None:
    write(picture, path, {**made_with, MARK: True}, force=_is_ours(path))


def _is_ours(path: Path) -> bool:
    try:
        return bool(read(path).get(MARK))
    except ConfigError:
        return False


if __name__ == "__main__":
    app()
