"""The command `plan`: what an accelerated run will do and take, before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from dit_accel.planning.result import RunPlan

_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


def plan(
    model: Annotated[str, typer.Option(help="True model by name (wan-14b, flux, ...), shipped model, or folder.")],
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels, such as 1280x720.", show_default=False)
    ] = None,
    frames: options.Frames = None,
    recipe: Annotated[str, typer.Option(help="Recipe or preset by name, or a YAML/JSON file.")] = "balanced",
    density: options.Density = None,
    set_: options.Set = None,
    steps: options.Steps = None,
    text_length: Annotated[int | None, typer.Option(help="Tokens of the prompt.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, or a measured GPU (h200); this machine's, else a measured one.", show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what an accelerated run will do, how long it will take and what it will hold, without any weights."""
    from .cli import parse_overrides, print_json
    from .screen import screen

    asked = {"frames": frames, "steps": steps, "text_length": text_length, **parse_size(size)}
    made = planned(model, asked, recipe, parse_overrides(density, set_ or []), device)
    if as_json:
        print_json(made.to_dict())
    else:
        screen().print(made, highlight=False)


def planned(model: str, asked: dict[str, Any], recipe: str, overrides: dict[str, Any], device: str | None) -> RunPlan:
    """Plan a model by name or folder, what is not asked taken from the folder's own defaults."""
    from dit_accel.api import demo_model, demo_models
    from dit_accel.config import build
    from dit_accel.errors import ConfigError
    from dit_accel.planning.run import plan

    from .settings import Settings, model_defaults

    folder = demo_model(model) if model in demo_models() else Path(model)
    settings: Settings = build(Settings, asked, "plan").over(model_defaults(folder))
    if settings.height is None or settings.width is None:
        raise ConfigError(f"size: {model} has none of its own; say --size WIDTHxHEIGHT.")
    return plan(
        model,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        recipe=recipe,
        steps=settings.steps,
        text_length=settings.text_length,
        device=device,
        **overrides,
    )


def parse_size(text: str | None) -> dict[str, int]:
    """Read WIDTHxHEIGHT; ConfigError for anything else."""
    from dit_accel.errors import ConfigError

    if text is None:
        return {}
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise ConfigError(f"size: expected WIDTHxHEIGHT in pixels, such as 1280x720, got {text!r}.")
    return {"width": int(found[1]), "height": int(found[2])}
