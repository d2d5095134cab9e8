"""One picture from one prompt, accelerated or stock, with its time and its report."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit_accel.api import RecipeLike, accelerate
from dit_accel.config import Recipe
from dit_accel.errors import ConfigError, NonFiniteError, UnsupportedError
from dit_accel.report import Report
from dit_accel.sparsity.recipes import resolve

TRUE_CFG = 2.0  # where a negative prompt asks for it and the pipeline's own default would ignore the prompt

_THEIRS = {  # our names of settings, and those of diffusers
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "text_length": "max_sequence_length",
}


@dataclass(frozen=True)
class Settings:
    """What is asked of a pipeline besides the prompt; None leaves the pipeline's own default.

    `guidance` is the pipeline's `guidance_scale`, `true_cfg` its `true_cfg_scale` where it has both.
    """

    steps: int | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    text_length: int | None = None

    def check(self) -> None:
        """Raise ConfigError for what no pipeline can take."""
        for name in ("steps", "height", "width", "text_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: at least 1 is needed, got {value}.")
        for name in ("guidance", "true_cfg"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number, got {value}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected a number from 0 to 2**63 - 1, got {self.seed}.")


@dataclass(frozen=True)
class Generation:
    """A picture, the seconds its pipeline call took, and all settings that made it, defaults filled in."""

    image: Image.Image
    seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Accelerated(Generation):
    """A picture made under a recipe, and what was done."""

    recipe: Recipe
    report: Report


def generate(
    pipe: Any,
    prompt: str,
    *,
    recipe: RecipeLike = "balanced",
    overrides: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    warm_up: bool = False,
) -> Accelerated:
    """Draw a prompt with a diffusers pipeline under a recipe, and leave the pipeline as it was.

    Args:
        recipe: what `accelerate` takes.
        overrides: settings of the recipe, such as `{"density": 0.3}`.
        warm_up: run one step before, so that the time holds no compilation and no first-use cost.

    Raises ConfigError for settings the pipeline does not take, UnsupportedError for a pipeline that makes no
    pictures from a prompt, NonFiniteError for latents or a picture with NaN or Inf.
    """
    settled = resolve(recipe, **(overrides or {}))
    with accelerate(pipe, settled) as handle:
        made = generate_stock(pipe, prompt, settings=settings, warm_up=warm_up)
        return Accelerated(made.image, made.seconds, made.settings, settled, handle.report())


def generate_stock(pipe: Any, prompt: str, *, settings: Settings | None = None, warm_up: bool = False) -> Generation:
    """Draw a prompt with a pipeline as it stands; arguments and errors as of `generate`."""
    arguments = call_arguments(pipe, prompt, settings or Settings())
    if warm_up:
        _call(pipe, {**arguments, "num_inference_steps": 1})
    image, seconds = _call(pipe, arguments)
    return Generation(image, seconds, _effective(pipe, arguments, image))


def call_arguments(pipe: Any, prompt: str, settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments for the pipeline's call; ConfigError where it does not take one."""
    accepted = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if "num_frames" in accepted or "prompt" not in accepted:
        raise UnsupportedError(f"{name} does not make pictures from a prompt alone, which is what generate does.")
    settings.check()
    _check_size(pipe, "height", settings.height)
    _check_size(pipe, "width", settings.width)
    arguments = {
        _THEIRS.get(key, key): value for key, value in asdict(settings).items() if key != "seed" and value is not None
    }
    for key in arguments:
        if key not in accepted:
            raise ConfigError(f"{key}: {name} takes no such setting.")
    if "negative_prompt" in arguments and "true_cfg_scale" in accepted:
        arguments.setdefault("true_cfg_scale", max(TRUE_CFG, accepted["true_cfg_scale"].default or 0))
    if "use_resolution_binning" in accepted and (settings.height or settings.width):
        arguments["use_resolution_binning"] = False  # it would draw another size than the one asked for
    if "callback_on_step_end" in accepted:
        arguments["callback_on_step_end"] = _check_last_latents
    generator = torch.Generator().manual_seed(settings.seed)  # on the CPU, for the same noise on every device
    return {**arguments, "prompt": prompt, "generator": generator, "output_type": "np"}


def _check_size(pipe: Any, side: str, size: int | None) -> None:
    """Refuse what pipelines round down in silence."""
    unit = size_unit(pipe)
    if size is None or size % unit == 0:
        return
    below = max(size // unit, 1) * unit
    valid = f"{unit}" if size < unit else f"{below} or {below + unit}"
    raise ConfigError(f"{side}: {type(pipe).__name__} needs a multiple of {unit}, got {size}; the nearest is {valid}.")


def size_unit(pipe: Any) -> int:
    """Return what height and width must be multiples of: the pixels of one token."""
    packed = hasattr(pipe, "_pack_latents")  # such pipelines make 2 x 2 latents one token
    patch = 2 if packed else pipe.transformer.config.get("patch_size")
    return getattr(pipe, "vae_scale_factor", 8) * (patch if isinstance(patch, int) else 1)


def _call(pipe: Any, arguments: dict[str, Any]) -> tuple[Image.Image, float]:
    generator = arguments["generator"]
    state = generator.get_state()
    _synchronise(pipe)
    start = time.perf_counter()
    pixels = np.asarray(pipe(**arguments).images[0])
    _synchronise(pipe)
    seconds = time.perf_counter() - start
    generator.set_state(state)  # the run after a warm-up begins with the same noise
    if not np.isfinite(pixels).all():
        raise NonFiniteError("the picture holds NaN or Inf, its latents did not: the VAE needs another dtype.")
    return pipe.image_processor.numpy_to_pil(pixels)[0], seconds


def _synchronise(pipe: Any) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)


def _check_last_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Check the latents that go to the VAE: its output is clamped, which would hide an Inf."""
    last = step + 1 >= len(pipe.scheduler.timesteps)
    if last and not torch.isfinite(tensors["latents"]).all():
        raise NonFiniteError(
            f"the latents after step {step} hold NaN or Inf; try another dtype (bf16 or fp32), and "
            "density 1 to see whether the stock pipeline does it too."
        )
    return {}


def _effective(pipe: Any, arguments: Mapping[str, Any], image: Image.Image) -> dict[str, Any]:
    """Return all settings as the pipeline understood them, its own defaults filled in."""
    accepted = inspect.signature(pipe.__call__).parameters
    filled = {
        ours: arguments.get(theirs, accepted[theirs].default) for ours, theirs in _THEIRS.items() if theirs in accepted
    }
    return {
        "prompt": arguments["prompt"],
        "seed": arguments["generator"].initial_seed(),
        "height": image.height,
        "width": image.width,
        **filled,
    }
