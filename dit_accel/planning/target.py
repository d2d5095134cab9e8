"""Where a run is planned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError, nearest
from .rates import Device, devices

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """Where a run is planned: the kind of device, which decides between dense and sparse, and its rates if measured."""

    kind: torch.device
    measured: Device | None
    name: str


def target(name: str | None, lies: torch.device | None) -> Target:
    """Settle where a run is planned; ConfigError for a device that is neither here nor measured.

    `name`: "cpu", "cuda", or a measured GPU's or a part of it; None: where the model `lies`, else this machine's GPU,
    else a measured one, first those that were measured with today's presets.
    """
    known, here = devices(), _local()
    if name is None:
        today = min(known, key=lambda gpu: len(known[gpu].settings), default="cpu")
        name = lies.type if lies is not None else here or today
    if name == "cpu":
        return Target(CPU, None, "cpu")
    if name == "cuda":
        if here is None:
            raise ConfigError(
                f"device: torch sees no CUDA device here; name a measured one: {', '.join(known) or 'none'}."
            )
        name = here
    if name == here and name not in known:
        return Target(torch.device("cuda"), None, name)
    fitting = [key for key in known if key == name] or [key for key in known if name.lower() in key.split("-")]
    if len(fitting) != 1:
        raise ConfigError(f"device: none that was measured is called {name!r}.{nearest(name, [*known, 'cpu', 'cuda'])}")
    return Target(torch.device("cuda"), known[fitting[0]], known[fitting[0]].gpu)


def _local() -> str | None:
    """Return this machine's GPU as the table names it, None without one."""
    return "-".join(torch.cuda.get_device_name().lower().split()) if torch.cuda.is_available() else None
