"""One picture or clip from one prompt, accelerated or stock, with its time and its report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_accel.api import RecipeLike, accelerate
from dit_accel.config import Profile, Recipe
from dit_accel.errors import DitAccelError, NonFiniteError, UnsupportedError
from dit_accel.report import Report
from dit_accel.sparsity.recipes import resolve

from .arguments import call_arguments, effective, generators_of, playing_speed
from .media import Media
from .settings import Settings


@dataclass(frozen=True)
class Generation:
    """A picture or clip, the seconds its pipeline call took, and all settings that made it, defaults filled in."""

    media: Media
    seconds: float
    settings: Mapping[str, Any]

    @property
    def image(self) -> Image.Image:
        """The picture, or the first frame of the clip."""
        return self.media.image


@dataclass(frozen=True)
class Accelerated(Generation):
    """A picture or clip made under a recipe, and what was done."""

    recipe: Recipe
    report: Report


def generate(
    pipe: Any,
    prompt: str,
    *,
    recipe: RecipeLike = "balanced",
    profile: Profile | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    warm_up: bool = False,
) -> Accelerated:
    """Draw a prompt with a diffusers pipeline under a recipe, and leave the pipeline as it was.

    Args:
        recipe, profile: what `accelerate` takes.
        overrides: settings of the recipe, such as `{"density": 0.3}`.
        warm_up: run one step before, so that the time holds no compilation and no first-use cost.

    Raises ConfigError for settings the pipeline does not take, UnsupportedError for a pipeline that needs more than
    a prompt, NonFiniteError for latents or pixels with NaN or Inf.
    """
    settled = resolve(recipe, **(overrides or {}))
    with accelerate(pipe, settled, profile=profile) as handle:
        made = generate_stock(pipe, prompt, settings=settings, warm_up=warm_up)
        return Accelerated(made.media, made.seconds, made.settings, settled, handle.report())


def generate_stock(
    pipe: Any, prompt: str, *, settings: Settings | None = None, warm_up: bool = False, batch: int = 1
) -> Generation:
    """Draw a prompt with a pipeline as it stands; arguments and errors as of `generate`.

    `batch`: how many are made at once, from seed, seed + 1 and so on; the first is returned, the seconds are of all.
    ConfigError or UnsupportedError where the pipeline makes one at a time only.
    """
    settings = settings or Settings()
    arguments = call_arguments(pipe, prompt, settings, batch)
    fps = playing_speed(type(pipe), settings)
    if warm_up:
        _call(pipe, {**arguments, "num_inference_steps": 1}, fps)
    media, seconds = _call(pipe, arguments, fps)
    return Generation(media, seconds, effective(pipe, arguments, media))


def _call(pipe: Any, arguments: dict[str, Any], fps: float | None) -> tuple[Media, float]:
    from diffusers.image_processor import VaeImageProcessor

    states = [(generator, generator.get_state()) for generator in generators_of(arguments)]
    _synchronise(pipe)
    start = time.perf_counter()
    made = _run(pipe, arguments, len(states))
    pixels = np.asarray(made[:1] if fps is None else made[0])
    _synchronise(pipe)
    seconds = time.perf_counter() - start
    for generator, state in states:
        generator.set_state(state)  # the run after a warm-up begins with the same noise
    if not np.isfinite(pixels).all():
        raise NonFiniteError("the pixels hold NaN or Inf, the latents did not: the VAE needs another dtype.")
    return Media(tuple(VaeImageProcessor.numpy_to_pil(pixels)), fps), seconds


def _run(pipe: Any, arguments: dict[str, Any], batch: int) -> Any:
    """Return the pictures or clips of a pipeline's call, `batch` of them.

    Some pipelines take a number of clips and go on with one, which as many generators then do not fit.
    """
    said = f"batch: {type(pipe).__name__} makes no {batch} of a prompt at once"
    try:
        made = pipe(**arguments)
    except DitAccelError:
        raise
    except ValueError as error:
        if batch == 1:
            raise
        raise UnsupportedError(f"{said} ({error})") from error
    found = made.images if hasattr(made, "images") else made.frames
    if batch > 1 and len(found) != batch:
        raise UnsupportedError(f"{said} (it made {len(found)}).")
    return found


def _synchronise(pipe: Any) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
