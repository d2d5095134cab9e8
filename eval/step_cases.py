"""The models and inputs of the step benchmark: true shapes with random weights on a few layers, and tiny twins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dit_accel.planning.inputs import INPUTS, Arguments
from dit_accel.planning.models import MODELS, TrueModel, cast


@dataclass(frozen=True)
class Case:
    """One model at one size.

    `layers`: how many blocks of each group are built. `grid`: latent frames, height and width, as the transformer is
    given them. `text`: text tokens. `changes`: settings that are not the true model's.
    """

    name: str
    model: TrueModel
    layers: int
    grid: tuple[int, int, int]
    text: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> Mapping[str, int]:
        """Attribute of the model that lists blocks -> depth of the real model."""
        return self.model.groups

    @property
    def depth(self) -> int:
        return sum(self.groups.values())

    def build(self) -> torch.nn.Module:
        """Build the transformer on the current default device."""
        return self.model.build(self.layers, **self.changes)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Arguments:
        """Return what its forward is given."""
        settings = {**self.model.settings, **self.changes}
        return INPUTS[self.model.family].make(settings, self.grid, self.text, device, dtype)


CASES = (
    Case("wan-14b-720p-81", MODELS["wan-14b"], 2, (21, 90, 160), 512),
    Case("hunyuan-720p-129", MODELS["hunyuan-video"], 1, (33, 90, 160), 256),
    Case("wan-1.3b-480p-81", MODELS["wan-1.3b"], 2, (21, 60, 104), 512),
    Case("flux-4096", MODELS["flux"], 1, (1, 256, 256), 512),
    Case("flux-2048", MODELS["flux"], 1, (1, 128, 128), 512),
    Case("hunyuan-720p-33", MODELS["hunyuan-video"], 1, (9, 90, 160), 256),
    Case("wan-1.3b-480p-33", MODELS["wan-1.3b"], 2, (9, 60, 104), 512),
)

_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
_WAN = {"text_dim": 32, "freq_dim": 32}
_TINY_SETTINGS: dict[str, dict[str, Any]] = {  # by model
    "wan-14b": {**_WAN, "ffn_dim": 64},
    "wan-1.3b": {**_WAN, "ffn_dim": 48},
    "hunyuan-video": {
        "in_channels": 4,
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "num_refiner_layers": 1,
    },
    "flux": {
        "in_channels": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}


def tiny(case: Case) -> Case:
    """Return a twin of a case that runs on a CPU in a moment: the same path, few channels and tokens, odd sizes."""
    changes = {**_SMALL, **_TINY_SETTINGS[case.model.name]}
    grid = (1, 23, 29) if case.grid[0] == 1 else (5, 14, 22)
    return replace(case, name=f"tiny-{case.name}", changes=changes, grid=grid, text=16)


def built(case: Case, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Build a case's model on its device, in `dtype` but for what diffusers keeps in fp32 when it loads weights."""
    with torch.device(device):
        return cast(case.build(), dtype)
