"""From what a person calls a model to a stock diffusers pipeline, ready to run."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from dit_accel.api import demo_model, demo_models
from dit_accel.errors import ConfigError, UnsupportedError, nearest

DEFAULT_MODEL, DEFAULT_CLIP_MODEL = "emoji-flux", "emoji-wan"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "auto")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline with diffusers' own `from_pretrained` and move it to a device.

    `source` is what `locate` returned. Raises ConfigError where diffusers cannot read it, UnsupportedError
    where it holds no transformer.
    """
    from diffusers import DiffusionPipeline

    local = Path(source).is_dir()
    try:
        with warnings.catch_warnings():
            # newer diffusers want `dtype`, which older ones would ignore
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, local_files_only=local)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a broken folder surfaces in many libraries, each with errors of its own
        what = "the folder cannot be loaded" if local else "is no folder here, and the Hub did not give it"
        raise ConfigError(f"model {source}: {what} ({type(error).__name__}: {_first_line(error)}).") from error
    if getattr(pipe, "transformer", None) is None:
        raise _no_transformer(source, type(pipe).__name__)
    return pipe.to(device)


def locate(model: str) -> str:
    """Turn a shipped model's name, a folder or a Hub id into what `from_pretrained` takes.

    A shipped name wins over a folder of the same name; `./name` is always the folder. Raises ConfigError
    where there is no such thing, UnsupportedError for a pipeline without a transformer.
    """
    if model in demo_models():
        return str(demo_model(model))
    path = Path(model).expanduser()
    if path.exists():
        _check_folder(path)
        return str(path)
    if _HUB_ID.fullmatch(model) and not path.parent.exists():
        return model
    raise ConfigError(
        f"model: there is no folder {model} and no shipped model of that name."
        f"{nearest(model, demo_models())} "
        "Expected a shipped model, a folder in diffusers' format, or a Hub id such as owner/name."
    )


def default_model(clip: bool) -> str:
    """Return the shipped model for pictures, or for clips; ConfigError where it is not installed."""
    name, what = (DEFAULT_CLIP_MODEL, "clips") if clip else (DEFAULT_MODEL, "pictures")
    if name not in demo_models():
        raise ConfigError(f"model: {name}, which makes {what}, is not installed here; name another with --model.")
    return name


def pipeline_class(source: str) -> type | None:
    """Return the diffusers pipeline class of a model folder; None for a Hub id, or a class of the folder's own."""
    import diffusers

    index = Path(source) / "model_index.json"
    if not index.is_file():
        return None
    name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def choose_device(name: str) -> torch.device:
    """Return the device asked for; ConfigError where it is unknown or this machine has none."""
    if name not in DEVICES:
        raise ConfigError(f"device: none is called {name!r}.{nearest(name, DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch sees no CUDA device here; `dit-accel doctor` says more.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype asked for; without a name bf16 on CUDA, fp32 on a CPU."""
    if name is None:
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise ConfigError(f"dtype: none is called {name!r}.{nearest(name, DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("dtype: fp16 needs a GPU; on a CPU use fp32 or bf16.")
    return DTYPES[name]


def _check_folder(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"model {path}: is no diffusers pipeline: expected a folder with a model_index.json, "
            "as save_pretrained() of a pipeline writes it."
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {path}: its model_index.json cannot be read ({_first_line(error)}).") from None
    if not isinstance(parts, dict) or "_class_name" not in parts:
        raise ConfigError(f"model {path}: its model_index.json names no pipeline class.")
    if parts.get("transformer") in (None, [None, None]):
        raise _no_transformer(str(path), parts["_class_name"])


def _no_transformer(source: str, pipeline: str) -> UnsupportedError:
    return UnsupportedError(
        f"model {source}: {pipeline} has no diffusion transformer, which is all that dit_accel accelerates."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message").rstrip(".")
