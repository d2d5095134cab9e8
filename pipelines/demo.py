"""What `make demo` shows: a few pictures and a clip, stock and accelerated, side by side in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from dit_accel.api import demo_models
from dit_accel.errors import ConfigError
from dit_accel.report import Report

from .compare import Cell, Likeness, sheet
from .generate import Accelerated, Generation, generate, generate_stock
from .loading import DEFAULT_CLIP_MODEL, DEFAULT_MODEL, choose_device, choose_dtype, load, locate
from .media import Media
from .provenance import check_target, read, write
from .screen import OneLineErrors, screen
from .settings import Settings, model_defaults

PROMPTS = (
    "watermelon, fluent flat style",
    "maple leaf, noto style",
    "wine glass, twemoji style",
    "monkey face, fluent 3d style",
)
CLIP_PROMPTS = ("a taco sliding left, noto style",)
RECIPE, DENSITIES = "hilbert-ear", (0.5, 0.3)
CPU_CLIP_STEPS = 10
SHEET = "side-by-side"
MARK = "demo"  # in the metadata of what this module wrote, and may therefore write again

app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Act:
    """One model of the demo: what it draws, and into which kind of file."""

    model: str
    prompts: tuple[str, ...]
    settings: Settings
    suffix: str
    densities: tuple[float, ...] = DENSITIES
    warm_up: bool = True

    @property
    def sheet(self) -> str:
        """The name of the file that shows everything side by side."""
        return SHEET + self.suffix

    def names(self, prompt: str) -> list[str]:
        """Return the names of the files of one prompt, stock first."""
        stem = prompt.replace(",", "").replace(" ", "-")
        return [f"{stem}-{which}{self.suffix}" for which in ("stock", *(f"density-{d}" for d in self.densities))]


@dataclass(frozen=True)
class Shown:
    """One prompt: what stock made of it, and what came out at each density."""

    prompt: str
    stock: Generation
    made: Sequence[Accelerated]

    def media(self) -> list[Media]:
        """Return stock's picture or clip and the others."""
        return [self.stock.media, *(made.media for made in self.made)]

    @cached_property
    def likeness(self) -> list[Likeness]:
        """How alike stock and each of the others are."""
        return [Likeness.of(self.stock.media, made.media) for made in self.made]

    def cells(self) -> list[Cell]:
        """Return the row of the sheet."""
        row = [Cell(self.stock.media, [self.prompt, f"stock, {self.stock.seconds:.2f} s"])]
        for made, alike in zip(self.made, self.likeness, strict=True):
            lines = [f"density {made.report.density:.2f}, {made.seconds:.2f} s", str(alike)]
            row.append(Cell(made.media, lines))
        return row


@app.callback(invoke_without_command=True)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="Shipped model, folder, or Hub id.")] = DEFAULT_MODEL,
    clip_model: Annotated[
        str | None, typer.Option(help="The same for the clip; emoji-wan where it is installed.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One prompt, a few steps.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw a few prompts, stock and accelerated, and say where the pictures and clips lie."""
    device = choose_device("auto")
    acts = [_pictures(model, device, quick)]
    if clip_model is not None or DEFAULT_CLIP_MODEL in demo_models():
        acts.append(_clips(clip_model or DEFAULT_CLIP_MODEL, device, quick))
    out.mkdir(parents=True, exist_ok=True)
    for act in acts:
        for name in (act.sheet, *(name for prompt in act.prompts for name in act.names(prompt))):
            check_target(out / name, force=_is_ours(out / name))
    for act in acts:
        _perform(act, out, device)


def _perform(act: Act, out: Path, device: torch.device) -> None:
    """Draw, write and print one act."""
    pipe = load(locate(act.model), choose_dtype(None, device), device)
    shown = [_show(pipe, prompt, act) for prompt in act.prompts]
    for row in shown:
        for name, media in zip(act.names(row.prompt), row.media(), strict=True):
            _write(media, out / name, {"prompt": row.prompt, **row.stock.settings})
    _write(sheet([row.cells() for row in shown]), out / act.sheet, {"prompts": [row.prompt for row in shown]})
    console = screen()
    console.print(_table(act, shown))
    for report in _last_reports(shown):
        console.print(report)
    print(f"written to: {out.resolve()}\nside by side: {(out / act.sheet).resolve()}")


def _pictures(model: str, device: torch.device, quick: bool) -> Act:
    """Return the pictures, of a size and in steps that a machine draws in good time: a CPU stays at 128 pixels."""
    size = 128 if device.type == "cpu" else 256
    settings = Settings(steps=4 if quick else 20, height=size, width=size, text_length=32)
    return Act(model, PROMPTS[:1] if quick else PROMPTS, settings, ".png")


def _clips(model: str, device: torch.device, quick: bool) -> Act:
    """Return the clip, as the model's own defaults ask for it; a GIF, which needs no ffmpeg and plays everywhere.

    A CPU takes minutes for each, so there (and with --quick) one of few steps is made beside stock, timed cold.
    """
    settings = Settings().over(model_defaults(locate(model)))
    if device.type != "cpu" and not quick:
        return Act(model, CLIP_PROMPTS, settings, ".gif")
    steps = min(settings.steps or CPU_CLIP_STEPS, 4 if quick else CPU_CLIP_STEPS)
    settings = settings.model_copy(update={"steps": steps})
    return Act(model, CLIP_PROMPTS, settings, ".gif", densities=DENSITIES[:1], warm_up=False)


def _show(pipe: Any, prompt: str, act: Act) -> Shown:
    pipe.set_progress_bar_config(desc=f"{prompt}: stock")
    stock = generate_stock(pipe, prompt, settings=act.settings, warm_up=act.warm_up)
    made = []
    for density in act.densities:
        pipe.set_progress_bar_config(desc=f"{prompt}: density {density}")
        asked = {"density": density}
        made.append(generate(pipe, prompt, recipe=RECIPE, overrides=asked, settings=act.settings, warm_up=act.warm_up))
    return Shown(prompt, stock, made)


def _table(act: Act, shown: Sequence[Shown]) -> Table:
    table = Table(title=f"{act.model}, recipe {RECIPE}, same seed", box=None, padding=(0, 2))
    for column in ("prompt", "stock", *(f"density {density}" for density in act.densities)):
        table.add_column(column)
    for row in shown:
        made = (f"{m.seconds:.2f} s, {alike}" for m, alike in zip(row.made, row.likeness, strict=True))
        table.add_row(row.prompt, f"{row.stock.seconds:.2f} s", *made)
    return table


def _last_reports(shown: Sequence[Shown]) -> list[Report]:
    return [made.report for made in shown[-1].made]


def _write(media: Media, path: Path, made_with: dict[str, Any]) -> None:
    write(media, path, {**made_with, MARK: True}, force=_is_ours(path))


def _is_ours(path: Path) -> bool:
    try:
        return bool(read(path).get(MARK))
    except ConfigError:
        return False


if __name__ == "__main__":
    app()
