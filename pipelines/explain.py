"""What `dit-accel explain` does: check what can be checked, load, generate, draw one attention call, write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.api import accelerate
from dit_accel.config import Profile
from dit_accel.errors import ConfigError
from dit_accel.explain import Explanation
from dit_accel.sparsity.draw import Cell
from dit_accel.sparsity.recipes import resolve

from .arguments import check_accepts
from .generate import Accelerated, generate_stock
from .job import describe
from .loading import choose_device, choose_dtype, load, locate, pipeline_class
from .media import Media, check_fits
from .provenance import check_target, write
from .settings import Settings, model_defaults


@dataclass(frozen=True)
class ExplainJob:
    """One attention call to look into.

    `heads` None stands for all, `query` None for the middle of the grid, `recipe` None for the profile's, or draft.
    """

    prompt: str
    output: Path
    site: int | str
    step: int
    model: str
    recipe: str | None
    overrides: Mapping[str, Any]
    settings: Settings
    query: Cell | None = None
    heads: Sequence[int] | None = None
    dtype: str | None = None
    device: str = "auto"
    force: bool = False
    profile: Path | None = None

    def run(self) -> Explanation:
        """Do it all; the picture carries its figures and what it was made with. Nothing is left half-written."""
        check_target(self.output, self.force)
        check_fits(self.output, False, "explain")
        profile = None if self.profile is None else Profile.load(self.profile)
        recipe = resolve(self.recipe or (profile.recipe if profile else "draft"), **self.overrides)
        if profile is not None:
            profile.check_recipe(recipe, str(self.profile))
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        source = locate(self.model)
        settings = self.settings.over(model_defaults(source))
        if settings.steps is not None and not 0 <= self.step < settings.steps:
            raise ConfigError(f"step: must lie in 0..{settings.steps - 1}, got {self.step}.")
        known = pipeline_class(source)
        if known is not None:
            check_accepts(known, settings)
        pipe = load(source, dtype, device)
        pipe.set_progress_bar_config(desc=recipe.name)
        with accelerate(pipe, recipe, profile=profile) as handle:
            look = handle.explain(self.site, self.step, self.query)
            made = generate_stock(pipe, self.prompt, settings=settings)
            done = Accelerated(made.media, made.seconds, made.settings, recipe, handle.report())
        picture = look.draw(heads=self.heads)
        made_with = describe(done, self.model, str(dtype).removeprefix("torch."), device.type)
        write(Media.picture(picture), self.output, {**made_with, "explained": look.to_dict()}, self.force)
        return look


def parse_query(text: str | None) -> Cell | None:
    """Turn 'frame,row,column' into three numbers; ConfigError where it is something else."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"query: expected FRAME,ROW,COLUMN, counted from 0, got {text!r}.")
    frame, row, column = (int(part) for part in parts)
    return frame, row, column
