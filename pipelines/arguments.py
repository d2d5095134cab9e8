"""From our settings to the keyword arguments of a pipeline's call, and back to what it understood."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dit_accel.errors import ConfigError, NonFiniteError, UnsupportedError
from dit_accel.planning.sizes import check_frames, check_side, size_unit, time_scale

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


def call_arguments(pipe: Any, prompt: str, settings: Settings, batch: int = 1) -> dict[str, Any]:
    """Return the keyword arguments for a pipeline's call that makes `batch` pictures or clips from seed, seed + 1, ...

    Errors as of `check_accepts`, for impossible sizes, and where a pipeline makes no more than one of a prompt at once.
    """
    check_accepts(type(pipe), settings)
    accepted = _accepted(type(pipe))
    name = type(pipe).__name__
    for side, size in (("height", settings.height), ("width", settings.width)):
        if size is not None:
            check_side(name, side, size, size_unit(pipe))
    if settings.frames is not None:
        check_frames(name, settings.frames, time_scale(pipe))
    arguments = {_THEIRS.get(key, key): value for key, value in _asked(type(pipe), settings).items()}
    if "negative_prompt" in arguments and "true_cfg_scale" in accepted:
        arguments.setdefault("true_cfg_scale", max(TRUE_CFG, accepted["true_cfg_scale"].default or 0))
    if "use_resolution_binning" in accepted and (settings.height or settings.width):
        arguments["use_resolution_binning"] = False  # it would draw another size than the one asked for
    if "callback_on_step_end" in accepted:
        arguments["callback_on_step_end"] = _check_last_latents
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(batch)]  # on the CPU: the same noise
    arguments |= {"prompt": prompt, "generator": generators[0], "output_type": "np"}
    if batch > 1:
        arguments |= {_count_setting(type(pipe)): batch, "generator": generators}
    return arguments


def _count_setting(pipeline: type) -> str:
    """Name the argument that says how many pictures or clips of a prompt are made at once."""
    name = "num_videos_per_prompt" if makes_clips(pipeline) else "num_images_per_prompt"
    if name not in _accepted(pipeline):
        raise ConfigError(f"batch: {pipeline.__name__} makes one of a prompt at a time.")
    return name


def generators_of(arguments: Mapping[str, Any]) -> list[torch.Generator]:
    """Return the generators that a call is given, one for each of its batch."""
    given = arguments["generator"]
    return given if isinstance(given, list) else [given]


def effective(pipe: Any, arguments: Mapping[str, Any], media: Media) -> dict[str, Any]:
    """Return all settings as the pipeline understood them, its own defaults filled in; of a batch, the first one's."""
    accepted = _accepted(type(pipe))
    filled = {
        ours: arguments.get(theirs, accepted[theirs].default) for ours, theirs in _THEIRS.items() if theirs in accepted
    }
    clip = {"frames": len(media.frames), "fps": media.fps} if media.is_clip else {}
    return {
        "prompt": arguments["prompt"],
        "seed": generators_of(arguments)[0].initial_seed(),
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


def _check_last_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Check the latents that go to the VAE: its output is clamped, which would hide an Inf."""
    last = step + 1 >= len(pipe.scheduler.timesteps)
    if last and not torch.isfinite(tensors["latents"]).all():
        raise NonFiniteError(
            f"the latents after step {step} hold NaN or Inf; try another dtype (bf16 or fp32), and "
            "density 1 to see whether the stock pipeline does it too."
        )
    return {}
