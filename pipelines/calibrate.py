"""What `dit-accel calibrate` does: check what can be checked, load, watch the model run as stock, write a profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.calibration import Progress, calibrate, check_calibrates
from dit_accel.config import HeadChoice, Profile, Recipe
from dit_accel.config.profile import check_name
from dit_accel.output import check_writable
from dit_accel.sparsity.recipes import resolve

from .arguments import call_arguments, check_accepts, makes_clips
from .loading import choose_device, choose_dtype, load, locate, pipeline_class
from .prompts import demo_prompts, listed_prompts
from .screen import screen
from .settings import Settings, model_defaults


@dataclass(frozen=True)
class Calibrated:
    """A profile, and where it lies."""

    output: Path
    profile: Profile

    def to_dict(self) -> dict[str, Any]:
        """Return what was found, summed up, as plain data."""
        profile = self.profile
        return {
            "output": str(self.output),
            "recipe": profile.recipe.name,
            "models": list(profile.models),
            "sites": len(profile.values),
            "windows": list(profile.windows),
            "made": profile.made.model_dump(mode="json"),
            "found": self._found(),
        }

    def _found(self) -> dict[str, Any]:
        """Count the heads, of all sites and windows, that take each pattern; or describe their floors."""
        profile = self.profile
        heads = [head for site in profile.values.values() for window in site for head in window or ()]
        if profile.choice is None:
            low, middle, high = (round(float(np.quantile(heads, q)), 4) for q in (0, 0.5, 1))
            return {"least": low, "median": middle, "most": high, "used_within": list(profile.clamp or (0, 1))}
        taken = Counter(int(head) for head in heads)
        return {name: taken[number] for number, name in enumerate(_names(profile.choice)) if taken[number]}

    def __str__(self) -> str:
        profile, found = self.profile, ", ".join(f"{name}: {value}" for name, value in self._found().items())
        what = "floors" if profile.choice is None else "heads by pattern"
        return (
            f"{self.output}: {profile.recipe.name} for {' and '.join(profile.models)}, {len(profile.values)} sites, "
            f"windows: {len(profile.windows)}\n{what}: {found}"
        )


@dataclass(frozen=True)
class CalibrateJob:
    """One profile to make. What can be known to be wrong before the model is loaded is said before."""

    model: str
    recipe: str
    output: Path
    overrides: Mapping[str, Any]
    prompts: Sequence[str] | None
    prompt_file: Path | None
    settings: Settings
    rows: int
    windows: int | None = None
    dtype: str | None = None
    device: str = "auto"
    force: bool = False

    def run(self) -> Calibrated:
        """Do it all; an error or an interruption leaves no half-written file."""
        check_writable(check_name(self.output), self.force)
        recipe = resolve(self.recipe, **self.overrides)
        check_calibrates(recipe, self.rows, self.windows)
        listed = listed_prompts(self.prompts, self.prompt_file)
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        source = locate(self.model)
        settings = self.settings.over(model_defaults(source))
        known = pipeline_class(source)
        if known is not None:
            check_accepts(known, settings)
        pipe = load(source, dtype, device)
        pipe.set_progress_bar_config(disable=True)
        profile = self._made(pipe, recipe, listed or demo_prompts(makes_clips(type(pipe))), settings)
        profile.save(self.output, self.force)
        return Calibrated(self.output, profile)

    def _made(self, pipe: Any, recipe: Recipe, prompts: list[str], settings: Settings) -> Profile:
        call = {**call_arguments(pipe, prompts[0], settings), "output_type": "latent"}
        del call["prompt"], call["generator"]
        with _progress(len(prompts)) as progress:
            return calibrate(
                pipe,
                recipe,
                prompts,
                rows=self.rows,
                windows=self.windows,
                seed=settings.seed,
                progress=progress,
                **call,
            )


def _names(choice: HeadChoice) -> list[str]:
    """Name the patterns in few words, their orders where these differ."""
    alike = len({option.order for option in choice.options}) == 1
    names = [
        option.select.brief if alike else f"{option.order.brief}: {option.select.brief}" for option in choice.options
    ]
    return [*names, "everything"]


@contextmanager
def _progress(prompts: int) -> Iterator[Progress]:
    """Show a bar on stderr, and yield what moves it on."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=screen(stderr=True)) as bar:
        task = bar.add_task("calibrate", total=prompts)

        def begun(run: int, step: int, steps: int) -> None:
            what = f"prompt {run} of {prompts}, step {step} of {steps}"
            bar.update(task, completed=run - 1 + (step - 1) / steps, description=what)

        yield begun
        bar.update(task, completed=prompts)
