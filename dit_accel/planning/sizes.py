"""Which sizes a pipeline takes: pixels and frames of one cell of latents, and of one token."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

_SCALES = {  # what pipelines call the pixels and the frames of one latent
    "space": ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor"),
    "time": ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"),
}


def space_scale(pipe: Any) -> int:
    """Return the pixels along one side of a latent."""
    return _scale(pipe, "space", 8)


def time_scale(pipe: Any) -> int:
    """Return the frames of one latent after the first."""
    return _scale(pipe, "time", 1)


def size_unit(pipe: Any) -> int:
    """Return what height and width must be multiples of: the pixels of one token."""
    packed = hasattr(pipe, "_pack_latents") and hasattr(pipe, "vae_scale_factor")
    patch = 2 if packed else pipe.transformer.config.get("patch_size")  # packed: 2 x 2 latents are one token
    if isinstance(patch, (tuple, list)):
        patch = patch[-1]
    return space_scale(pipe) * (patch if isinstance(patch, int) else 1)


def check_side(owner: str, side: str, size: int, unit: int) -> None:
    """Raise ConfigError, with the nearest that fits, for a side that `owner` would round down in silence."""
    if size > 0 and size % unit == 0:
        return
    below = max(size // unit, 1) * unit
    valid = f"{unit}" if size < unit else f"{below} or {below + unit}"
    raise ConfigError(f"{side}: {owner} needs a multiple of {unit}, got {size}; the nearest is {valid}.")


def check_frames(owner: str, frames: int, unit: int) -> None:
    """Raise ConfigError, with the nearest that fits, for frames that `owner` would round down in silence."""
    if frames > 0 and (frames - 1) % unit == 0:
        return
    below = max(frames - 1, 0) // unit * unit + 1
    valid = "1" if frames < 1 else f"{below} or {below + unit}"
    raise ConfigError(f"frames: {owner} needs 1 more than a multiple of {unit}, got {frames}; the nearest is {valid}.")


def _scale(pipe: Any, kind: str, otherwise: int) -> int:
    return next((int(getattr(pipe, name)) for name in _SCALES[kind] if hasattr(pipe, name)), otherwise)
