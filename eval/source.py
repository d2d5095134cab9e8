"""What every benchmark writes beside its figures: on what device, with what versions and from what commit."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(device: torch.device, commit: str = "") -> dict[str, str]:
    """Return the device's name, versions, date and commit; a commit given is taken where there is no repository."""
    return {
        "gpu": _name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "commit": commit or _head(),
        "date": datetime.date.today().isoformat(),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or 'cpu'} {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    """Say which version is installed without importing it: an import would settle how Triton runs."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _head() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
