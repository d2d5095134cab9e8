"""dit_accel: sparse attention and attention controls for Hugging Face diffusers' diffusion transformers.

import dit_accel
with dit_accel.accelerate(pipe, "draft", density=0.3) as handle:
    picture = pipe("a taco").images[0]
    print(handle.report())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .acceleration import Acceleration
    from .api import AttentionState, accelerate, attention, demo_model, demo_models, recipes
    from .calibration import Calibration, calibrate
    from .config import Profile, Recipe
    from .errors import DitAccelError
    from .layout import Grid, Pad, Text, TokenLayout
    from .planning.result import RunPlan
    from .planning.run import plan
    from .report import Report

_HOMES = {
    "Acceleration": "acceleration",
    "AttentionState": "api",
    "Calibration": "calibration",
    "DitAccelError": "errors",
    "Grid": "layout",
    "Pad": "layout",
    "Profile": "config",
    "Recipe": "config",
    "Report": "report",
    "RunPlan": "planning.result",
    "Text": "layout",
    "TokenLayout": "layout",
    "accelerate": "api",
    "attention": "api",
    "calibrate": "calibration",
    "demo_model": "api",
    "demo_models": "api",
    "plan": "planning.run",
    "recipes": "api",
}
__all__ = [
    "Acceleration",
    "AttentionState",
    "Calibration",
    "DitAccelError",
    "Grid",
    "Pad",
    "Profile",
    "Recipe",
    "Report",
    "RunPlan",
    "Text",
    "TokenLayout",
    "__version__",
    "accelerate",
    "attention",
    "calibrate",
    "demo_model",
    "demo_models",
    "plan",
    "recipes",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dit_accel` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
