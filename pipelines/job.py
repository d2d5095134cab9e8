"""What `dit-accel generate` does: check everything that can be checked, load, draw, write, report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from dit_accel import __version__
from dit_accel.config import Profile, Recipe
from dit_accel.sparsity.recipes import resolve

from .arguments import check_accepts, makes_clips, playing_speed
from .compare import GAIN, Cell, Likeness, difference, sheet
from .generate import Accelerated, Generation, generate, generate_stock
from .loading import choose_device, choose_dtype, default_model, load, locate, pipeline_class
from .media import Media, check_fits, check_fps, format_of, stored_size
from .provenance import check_target, write
from .settings import Settings, model_defaults


@dataclass(frozen=True)
class Comparison:
    """A stock run beside an accelerated one of the same seed, and where the sheet of both lies."""

    stock: Generation
    sheet: Path
    likeness: Likeness


@dataclass(frozen=True)
class Result:
    """What a job made and where it lies."""

    output: Path
    made: Accelerated
    made_with: Mapping[str, Any]
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        data = {
            "output": str(self.output),
            **self.made_with,
            "seconds": self.made.seconds,
            "report": self.made.report.to_dict(),
        }
        if self.comparison is not None:
            data |= {
                "compare": str(self.comparison.sheet),
                "seconds_stock": self.comparison.stock.seconds,
                **self.comparison.likeness.to_dict(),
            }
        return data

    def __str__(self) -> str:
        line = f"{self.output}: {self.made.seconds:.2f} s"
        if self.made.media.fps is not None:
            asked = f" ({self.made_with['frames_asked']} asked)" if "frames_asked" in self.made_with else ""
            line += f", frames: {len(self.made.media.frames)}{asked} at {self.made.media.fps:g} a second"
        if "stored_size" in self.made_with:
            width, height = self.made_with["stored_size"]
            line += f"; stored as {width}x{height}, the edge repeated, because H.264 takes even sides"
        if self.comparison is None:
            return line
        other, alike = self.comparison, self.comparison.likeness
        single = alike.psnr_min is None or len(alike.frame_psnr) == 1
        worst = "" if single else f", worst frame {alike.psnr_min:.1f} dB"
        return f"{line}\n{other.sheet}: stock {other.stock.seconds:.2f} s, {alike}{worst}"


@dataclass(frozen=True)
class Job:
    """One picture or clip to make. What can be known to be wrong before the model is loaded is said before.

    `model` None stands for the shipped model that makes what the output's name asks for.
    """

    prompt: str
    output: Path
    model: str | None
    recipe: str | None
    overrides: Mapping[str, Any]
    settings: Settings
    dtype: str | None = None
    device: str = "auto"
    compare: bool = False
    force: bool = False
    profile: Path | None = None

    def run(self) -> Result:
        """Do it all; an error or an interruption leaves no half-written file."""
        for path in self._targets():
            check_target(path, self.force)
        profile = None if self.profile is None else Profile.load(self.profile)
        recipe = resolve(self.recipe or (profile.recipe if profile else "balanced"), **self.overrides)
        if profile is not None:
            profile.check_recipe(recipe, str(self.profile))
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        model = self.model or default_model(self._wants_clip())
        source = locate(model)
        settings = self.settings.over(model_defaults(source))
        self._check_fit(pipeline_class(source), settings)
        pipe = load(source, dtype, device)
        self._check_fit(type(pipe), settings)
        stock = self._draw_stock(pipe, settings) if self.compare else None
        made = self._draw(pipe, recipe, settings, profile)
        made_with = describe(made, model, str(dtype).removeprefix("torch."), device.type)
        made_with |= self._unlike_asked(made.media, settings)
        if profile is not None:
            made_with["profile"] = profile.made.model_dump(mode="json")
        write(made.media, self.output, made_with, self.force)
        comparison = None if stock is None else self._compare(stock, made, made_with)
        return Result(self.output, made, made_with, comparison)

    def _wants_clip(self) -> bool:
        """Return whether name and settings ask for a clip; a name that stands for both means a picture by itself."""
        wanted = format_of(self.output)
        asked = self.settings.frames is not None or self.settings.fps is not None
        return wanted.clip and (asked or not wanted.picture)

    def _check_fit(self, pipeline: type | None, settings: Settings) -> None:
        """Refuse a pipeline that makes something else than asked; before the model is loaded where it is known."""
        if pipeline is None:
            return
        for path in self._targets():
            check_fits(path, makes_clips(pipeline), pipeline.__name__)
            check_fps(path, playing_speed(pipeline, settings) or 0)
        check_accepts(pipeline, settings)

    def _draw_stock(self, pipe: Any, settings: Settings) -> Generation:
        pipe.set_progress_bar_config(desc="stock")
        return generate_stock(pipe, self.prompt, settings=settings, warm_up=True)

    def _draw(self, pipe: Any, recipe: Recipe, settings: Settings, profile: Profile | None) -> Accelerated:
        pipe.set_progress_bar_config(desc=recipe.name)
        return generate(pipe, self.prompt, recipe=recipe, profile=profile, settings=settings, warm_up=self.compare)

    def _targets(self) -> list[Path]:
        return [self.output, *([compare_path(self.output)] if self.compare else [])]

    def _unlike_asked(self, media: Media, settings: Settings) -> dict[str, Any]:
        """Return what file format or pipeline made different from what was asked, to be said and noted."""
        stored = stored_size(self.output, media.image.size)
        unlike: dict[str, Any] = {} if stored == media.image.size else {"stored_size": stored}
        if settings.frames not in (None, len(media.frames)):  # CogVideoX decodes even numbers of latents to more
            unlike["frames_asked"] = settings.frames
        return unlike

    def _compare(self, stock: Generation, made: Accelerated, made_with: Mapping[str, Any]) -> Comparison:
        likeness = Likeness.of(stock.media, made.media)
        path = compare_path(self.output)
        write(side_by_side(stock, made, likeness), path, made_with, self.force)
        return Comparison(stock, path, likeness)


def compare_path(output: Path) -> Path:
    """Return where the comparison lies: in the same format if that can hold clips, else in PNG, sharp for its text."""
    return output.with_name(f"{output.stem}-compare{output.suffix if format_of(output).clip else '.png'}")


def side_by_side(stock: Generation, made: Accelerated, likeness: Likeness) -> Media:
    """Draw stock, accelerated and their difference, labelled."""
    density = f"{made.recipe.name}, overall density {made.report.overall_density:.2f}"
    return sheet(
        [
            [
                Cell(stock.media, ["stock", f"{stock.seconds:.2f} s"]),
                Cell(made.media, [density, f"{made.seconds:.2f} s"]),
                Cell(difference(stock.media, made.media), [f"difference x {GAIN}", str(likeness)]),
            ]
        ]
    )


def describe(made: Accelerated, model: str, dtype: str, device: str) -> dict[str, Any]:
    """Return what a picture or clip was made with, as plain data."""
    return {
        **made.settings,
        "model": model,
        "recipe": made.recipe.name,
        "recipe_settings": made.recipe.model_dump(mode="json"),
        "density": made.report.density,
        "overall_density": made.report.overall_density,
        "dtype": dtype,
        "device": device,
        "versions": {
            "dit_accel": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
