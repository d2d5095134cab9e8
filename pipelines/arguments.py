"""From our settings to the keyword arguments of a pipeline's call, and back to what it understood."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.errors import ConfigError, NonFiniteError, UnsupportedError

from .media import Media
from .settings import Settings

TRUE_CFG = 2.0  # where a negative prompt asks for it and the pipeline's own default would ignore the prompt
FPS = 16.0  # of clips whose pipeline and model say nothing

_THEIRS = {  # our names of settings, and those of diffusers
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "text_length": "max_sequence_length",
    "frames": "num_frames",
    "fps": "frame_rate",
}
_SCALES = {  # what pipelines call the pixels and the frames of one latent
    "space": ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"),
    "time": ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"),
}


def makes_clips(pipeline: type) -> bool:
    """Return whether a pipeline class makes clips rather than pictures."""
    return "num_frames" in _accepted(pipeline)


def playing_speed(pipeline: type, settings: Settings) -> float | None:
    """Return the frames a second of what a pipeline class makes: as asked, else its own, else FPS; None: a picture."""
    if not makes_clips(pipeline):
        return None
    theirs = _accepted(pipeline).get("frame_rate")
    return settings.fps or float(theirs.default if theirs else FPS)


def check_accepts(pipeline: type, settings: Settings) -> None:
    """Raise ConfigError for settings that a pipeline class does not take, UnsupportedError where a prompt won't do."""
    accepted, name = _accepted(pipeline), pipeline.__name__
    needed = [key for key, value in accepted.items() if _is_required(value)]
    if "prompt" not in accepted or set(needed) - {"prompt"}:
        more = f" (it needs {', '.join(needed)})" if needed else ""
        raise UnsupportedError(f"{name} makes nothing from a prompt alone, which is what generate does{more}.")
    for key in _asked(pipeline, settings):
        if _THEIRS.get(key, key) not in accepted:
            raise ConfigError(f"{key}: {name} takes no such setting.")


def call_arguments(pipe: Any, prompt: str, settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments for the pipeline's call; errors as of `check_accepts`, and for impossible sizes."""
    check_accepts(type(pipe), settings)
    accepted = _accepted(type(pipe))
    _check_size(pipe, "height", settings.height)
    _check_size(pipe, "width", settings.width)
    _check_frames(pipe, settings.frames)
    arguments = {_THEIRS.get(key, key): value for key, value in _asked(type(pipe), settings).items()}
    if "negative_prompt" in arguments and "true_cfg_scale" in accepted:
        arguments.setdefault("true_cfg_scale", max(TRUE_CFG, accepted["true_cfg_scale"].default or 0))
    if "use_resolution_binning" in accepted and (settings.height or settings.width):
        arguments["use_resolution_binning"] = False  # it would draw another size than the one asked for
    if "callback_on_step_end" in accepted:
        arguments["callback_on_step_end"] = _check_last_latents
    generator = torch.Generator().manual_seed(settings.seed)  # on the CPU, for the same noise on every device
    return {**arguments, "prompt": prompt, "generator": generator, "output_type": "np"}


def effective(pipe: Any, arguments: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """Return all settings as the pipeline understood them, its own defaults filled in."""
    accepted = _accepted(type(pipe))
    filled = {
        ours: arguments.get(theirs, accepted[theirs].default) for ours, theirs in _THEIRS.items() if theirs in accepted
    }
    clip = {"frames": len(media.frames), "fps": media.fps} if media.is_clip else {}
    return {
        "prompt": arguments["prompt"],
        "seed": arguments["generator"].initial_seed(),
        "height": media.image.height,
        "width": media.image.width,
        **filled,
        **clip,
    }


def _asked(pipeline: type, settings: Settings) -> dict[str, Any]:
    """Return the settings that go into the pipeline's call, by our names."""
    asked = settings.model_dump(exclude_none=True, exclude={"seed"})
    if makes_clips(pipeline) and "frame_rate" not in _accepted(pipeline):
        asked.pop("fps", None)  # such a model knows frames only; how fast they play is up to the file
    return asked


def _accepted(pipeline: type) -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(pipeline.__call__).parameters)
    parameters.pop("self", None)
    return parameters


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _check_size(pipe: Any, side: str, size: int | None) -> None:
    """Refuse what pipelines round down in silence."""
    unit = size_unit(pipe)
    if size is None or size % unit == 0:
        return
    below = max(size // unit, 1) * unit
    valid = f"{unit}" if size < unit else f"{below} or {below + unit}"
    raise ConfigError(f"{side}: {type(pipe).__name__} needs a multiple of {unit}, got {size}; the nearest is {valid}.")


def _check_frames(pipe: Any, frames: int | None) -> None:
    """Refuse what pipelines round down in silence."""
    unit = _scale(pipe, "time", 1)
    if frames is None or (frames - 1) % unit == 0:
        return
    below = (frames - 1) // unit * unit + 1
    raise ConfigError(
        f"frames: {type(pipe).__name__} needs 1 more than a multiple of {unit}, got {frames}; "
        f"the nearest is {below} or {below + unit}."
    )


def size_unit(pipe: Any) -> int:
    """Return what height and width must be multiples of: the pixels of one token."""
    packed = hasattr(pipe, "_pack_latents") and hasattr(pipe, "vae_scale_factor")
    patch = 2 if packed else pipe.transformer.config.get("patch_size")  # packed: 2 x 2 latents are one token
    if isinstance(patch, (tuple, list)):
        patch = patch[-1]
    return _scale(pipe, "space", 8) * (patch if isinstance(patch, int) else 1)


def _scale(pipe: Any, kind: str, otherwise: int) -> int:
    return next((int(getattr(pipe, name)) for name in _SCALES[kind] if hasattr(pipe, name)), otherwise)


def _check_last_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Check the latents that go to the VAE: its output is clamped, which would hide an Inf."""
    last = step + 1 >= len(pipe.scheduler.timesteps)
    if last and not torch.isfinite(tensors["latents"]).all():
        raise NonFiniteError(
            f"the latents after step {step} hold NaN or Inf; try another dtype (bf16 or fp32), and "
            "density 1 to see whether the stock pipeline does it too."
        )
    return {}
