"""What `dit-accel generate` does: check everything that can be checked, load, draw, write, report."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from dit_accel import __version__
from dit_accel.config import Recipe
from dit_accel.sparsity.recipes import resolve

from .compare import GAIN, Cell, Likeness, difference, sheet
from .generate import Accelerated, Generation, Settings, generate, generate_stock
from .loading import choose_device, choose_dtype, load, locate
from .provenance import check_target, write


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
                "psnr": self.comparison.likeness.psnr,
                "ssim": self.comparison.likeness.ssim,
            }
        return data

    def __str__(self) -> str:
        line = f"{self.output}: {self.made.seconds:.2f} s"
        if self.comparison is None:
            return line
        other = self.comparison
        return f"{line}\n{other.sheet}: stock {other.stock.seconds:.2f} s, {other.likeness}"


@dataclass(frozen=True)
class Job:
    """One picture to make. What can be known to be wrong before the model is loaded is said before."""

    prompt: str
    output: Path
    model: str
    recipe: str
    overrides: Mapping[str, Any]
    settings: Settings
    dtype: str | None = None
    device: str = "auto"
    compare: bool = False
    force: bool = False

    def run(self) -> Result:
        """Do it all; an error or an interruption leaves no half-written file."""
        recipe, source, dtype, device = self._checked()
        pipe = load(source, dtype, device)
        stock = self._draw_stock(pipe) if self.compare else None
        made = self._draw(pipe, recipe)
        made_with = describe(made, self.model, str(dtype).removeprefix("torch."), device.type)
        write(made.image, self.output, made_with, self.force)
        comparison = None if stock is None else self._compare(stock, made, made_with)
        return Result(self.output, made, made_with, comparison)

    def _checked(self) -> tuple[Recipe, str, torch.dtype, torch.device]:
        for path in self._targets():
            check_target(path, self.force)
        self.settings.check()
        recipe = resolve(self.recipe, **self.overrides)
        device = choose_device(self.device)
        return recipe, locate(self.model), choose_dtype(self.dtype, device), device

    def _draw_stock(self, pipe: Any) -> Generation:
        pipe.set_progress_bar_config(desc="stock")
        return generate_stock(pipe, self.prompt, settings=self.settings, warm_up=True)

    def _draw(self, pipe: Any, recipe: Recipe) -> Accelerated:
        pipe.set_progress_bar_config(desc=recipe.name)
        return generate(pipe, self.prompt, recipe=recipe, settings=self.settings, warm_up=self.compare)

    def _targets(self) -> list[Path]:
        return [self.output, *([compare_path(self.output)] if self.compare else [])]

    def _compare(self, stock: Generation, made: Accelerated, made_with: Mapping[str, Any]) -> Comparison:
        likeness = Likeness.of(stock.image, made.image)
        path = compare_path(self.output)
        write(side_by_side(stock, made, likeness), path, made_with, self.force)
        return Comparison(stock, path, likeness)


def compare_path(output: Path) -> Path:
    """Return where the comparison of a picture lies."""
    return output.with_name(f"{output.stem}-compare.png")


def side_by_side(stock: Generation, made: Accelerated, likeness: Likeness) -> Image.Image:
    """Draw stock, accelerated and their difference, labelled."""
    density = f"{made.recipe.name}, overall density {made.report.overall_density:.2f}"
    return sheet(
        [
            [
                Cell(stock.image, ["stock", f"{stock.seconds:.2f} s"]),
                Cell(made.image, [density, f"{made.seconds:.2f} s"]),
                Cell(difference(stock.image, made.image), [f"difference x {GAIN}", str(likeness)]),
            ]
        ]
    )


def describe(made: Accelerated, model: str, dtype: str, device: str) -> dict[str, Any]:
    """Return what a picture was made with, as plain data."""
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
