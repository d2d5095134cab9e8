"""What this machine can run, and what to do about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
# distribution: (lowest version that may work, newest version the tests ran with)
VERSIONS = {
    "torch": ("2.9", "2.13"),
    "diffusers": ("0.40", "0.42"),
    "transformers": ("4.56", "5.23"),
    "triton": ("3.5", "3.9"),
}
HEAD_DIM = 64


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do about it where it is not `ok`."""

    name: str
    status: Status
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Look at everything; nothing is downloaded or changed. `fail` means that pictures can't be made here."""
    return [
        _python(),
        *(_version(name) for name in VERSIONS),
        *_guarded("cuda", _cuda),
        *_guarded("kernel", _kernel),
        *_guarded("tiles", _tiles),
        *_guarded("opencv", _opencv),
        _ffmpeg(),
        _hub_kernels(),
        _demo_models(),
    ]


def _guarded(name: str, look: Callable[[], Check]) -> Iterator[Check]:
    """Turn a library that cannot even be imported into a finding."""
    try:
        yield look()
    except Exception as error:  # a doctor that crashes on the sick helps nobody
        yield Check(name, "fail", f"{type(error).__name__}: {error}", "repair the installation named there")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", "ok", f"{found}, {os.cpu_count()} CPU cores")


def _version(name: str) -> Check:
    lowest, tested = VERSIONS[name]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "triton":
            return Check(name, "warn", "not installed", "needed for the fast kernels: a Linux wheel of torch brings it")
        return Check(name, "fail", "not installed", f"pip install '{name}>={lowest}'")
    if _numbers(found) < _numbers(lowest):
        return Check(name, "fail", f"{found}, too old", f"pip install '{name}>={lowest}'")
    if _numbers(found)[:2] > _numbers(tested)[:2]:
        return Check(
            name,
            "warn",
            f"{found}, newer than the tested {tested}",
            "compare with --density 1 if pictures look wrong",
        )
    return Check(name, "ok", f"{found} (tested with {tested})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _cuda() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = "torch is built for it, but sees no device" if torch.version.cuda else "torch is a CPU build"
        advice = "pictures are right but slow; for speed use an NVIDIA GPU and a CUDA build of torch"
        return Check("cuda", "warn", f"none ({built})", advice)
    properties = torch.cuda.get_device_properties(0)
    found = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
    if properties.major < 8:
        return Check("cuda", "warn", found, "the kernels are made for sm_80 (Ampere) and newer")
    return Check("cuda", "ok", found)


def _kernel() -> Check:
    import torch

    from dit_accel.backend import kernel_name

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    kernel, why = kernel_name(device, dtype, HEAD_DIM)
    found = f"sparse calls on {device.type} run on the {kernel} back end"
    if not why:
        return Check("kernel", "ok", found)
    return Check("kernel", "warn", f"{found} ({why})", "right on every machine, fast only on CUDA")


def _tiles() -> Check:
    """Say which table the kernels take their tiles from: measured on this GPU, or committed."""
    import torch

    from dit_accel.kernels.block_sparse import tuned

    gpu = tuned.gpu_name(torch.device("cuda", 0)) if torch.cuda.is_available() else ""
    if not gpu:
        return Check("tiles", "ok", "the committed table (no CUDA device)")
    try:
        table = tuned.read(tuned.path(gpu))
    except ValueError as error:
        return Check("tiles", "fail", f"sparse calls will fail: {error}", "dit-accel tune-kernels --reset")
    if table is None:
        return Check("tiles", "ok", "the committed table (dit-accel tune-kernels measures this GPU)")
    why = table.misfit(gpu)
    if why:
        return Check("tiles", "warn", f"the committed table ({tuned.path(gpu)}: {why})", "dit-accel tune-kernels")
    found = f"{len(table.tiles)} measured on this GPU on {table.date}, else the committed table: {tuned.path(gpu)}"
    return Check("tiles", "ok", found)


def _opencv() -> Check:
    import cv2

    return Check("opencv", "ok", cv2.__version__)


def _ffmpeg() -> Check:
    from dit_accel.errors import ConfigError

    from . import ffmpeg

    try:
        return Check("ffmpeg", "ok", f"writes H.264: {ffmpeg.check()}")
    except ConfigError as error:
        return Check("ffmpeg", "warn", str(error), "needed for .mp4 only: pip install --force-reinstall imageio-ffmpeg")


def _hub_kernels() -> Check:
    """Find Hugging Face's package `kernels`; a folder of that name in the working directory is not it."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        return Check("hub kernels", "ok", "not installed (optional: diffusers' attention back ends from the Hub)")
    try:
        importlib.import_module("kernels")
    except Exception as error:
        return Check("hub kernels", "warn", f"{type(error).__name__}: {error}", "pip install -U kernels, or remove it")
    return Check("hub kernels", "ok", f"importable from {spec.origin}")


def _demo_models() -> Check:
    from dit_accel.api import demo_models

    from .loading import DEFAULT_MODEL

    found = demo_models()
    if DEFAULT_MODEL in found:
        return Check("demo models", "ok", ", ".join(found))
    advice = "reinstall dit_accel, or name a model of your own with --model"
    return Check("demo models", "fail", f"{DEFAULT_MODEL} is missing", advice)
