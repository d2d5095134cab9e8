"""What is planned: a pipeline, a transformer or a name, as a twin without weights and the sizes it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..acceleration import known_family
from ..api import demo_model, demo_models, transformers_of
from ..errors import ConfigError, UnsupportedError, nearest
from ..hosts import Family, all_families
from ..hosts.geometry import patch
from .inputs import INPUTS, Cells, Inputs
from .models import MODELS, skeleton, true_twin, twin
from .sizes import check_frames, check_side, space_scale, time_scale

STEPS = 50


@dataclass(frozen=True)
class Subject:
    """One model to plan.

    `given`: the transformer itself, or its twin where only a name is known; `twin` of it on no device. `space`: pixels
    along one side of a cell of latents, `time`: frames of one latent after the first, None for pictures. `weights`:
    bytes of all its transformers, of which there are `several` or one.
    """

    name: str
    given: torch.nn.Module
    twin: torch.nn.Module
    family: Family
    inputs: Inputs
    space: int
    time: int | None
    steps: int
    weights: int
    several: bool = False

    @property
    def device(self) -> torch.device | None:
        """Where the model lies, None where it has no weights."""
        found = next(self.given.parameters()).device
        return None if found.type == "meta" else found

    @property
    def unit(self) -> int:
        """What height and width must be multiples of: the pixels of one token."""
        return self.space * (1 if self.inputs.packed > 1 else patch(self.twin)[1])

    def cells(self, height: int, width: int, frames: int | None) -> Cells:
        """Return the cells of latents of a size; raise ConfigError for one the model does not take."""
        for side, size in (("height", height), ("width", width)):
            check_side(self.name, side, size, self.unit)
        if self.time is None:
            if frames is not None:
                raise ConfigError(f"frames: {self.name} makes pictures, which have none.")
            return 1, height // self.space, width // self.space
        if frames is None:
            raise ConfigError(f"frames: {self.name} makes clips; say of how many frames.")
        check_frames(self.name, frames, self.time)
        return (frames - 1) // self.time + 1, height // self.space, width // self.space


def subject(model: Any) -> Subject:
    """Find out what is to be planned.

    Raises ConfigError for a name or folder that is none, UnsupportedError for a model whose inputs are not known.
    """
    if isinstance(model, (str, Path)):
        name = str(model)
        if name in MODELS:
            return _named(name)
        if name in demo_models():
            model = skeleton(demo_model(name), torch.bfloat16)
        elif Path(name).is_dir():
            model = skeleton(Path(name), torch.bfloat16)
        else:
            raise ConfigError(f"model: no model is called {name!r}.{nearest(name, names())} A folder works, too.")
        return _held(model, Path(name).name)
    return _held(model, type(model).__name__)


def names() -> list[str]:
    """List the names that can be planned: true models, and those that ship inside the package."""
    return [*MODELS, *demo_models()]


def _named(name: str) -> Subject:
    model = MODELS[name]
    made = true_twin(model, torch.bfloat16)
    inputs = INPUTS[model.family]
    space = inputs.space * inputs.packed
    return Subject(name, made, made, known_family(made), inputs, space, inputs.time, model.steps, _bytes(made))


def _held(model: Any, name: str) -> Subject:
    """Describe a pipeline, or a bare transformer with the VAE that its family usually has."""
    found = transformers_of(model)
    given = next(iter(found.values()))
    family = known_family(given)
    if family.name not in INPUTS:
        known = ", ".join(sorted(cls for f in all_families() if f.name in INPUTS for cls in f.classes))
        raise UnsupportedError(f"{type(given).__name__}: what its forward is given is not known here. Known: {known}.")
    inputs = INPUTS[family.name]
    space, time = inputs.space, inputs.time
    if not isinstance(model, torch.nn.Module):
        space, time = space_scale(model), time_scale(model) if inputs.time else None
    weights = sum(map(_bytes, found.values()))
    return Subject(
        name, given, twin(given), family, inputs, space * inputs.packed, time, STEPS, weights, len(found) > 1
    )


def _bytes(module: torch.nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
