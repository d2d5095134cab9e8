"""Keys and values of the prompt, the same at every step: computed once a run and branch, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .call import Site
from .origin import Origin, Unchanged
from .step import StepInfo

LIMIT = 2 << 30  # bytes kept; two 14B experts of 40 layers with 512 text tokens and guidance take less
Values = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class _Kept:
    origin: Unchanged
    values: Values
    nbytes: int


class TextKV:
    """Keep the text keys and values of cross-attentions within one run, up to `limit` bytes.

    They are kept per (site, guidance branch) and used again only while the prompt's tensors and all weights on the
    way are the same objects, unwritten (`origin.Unchanged`); a new run drops them all.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.reused = self.computed = 0
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._refusals: dict[str, None] = {}
        self._run: int | None = None

    def clear(self) -> None:
        """Free everything that is kept."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        return sum(kept.nbytes for kept in self._kept.values())

    def get(self, site: Site, step: StepInfo, origin: Origin, make: Callable[[], Values]) -> Values:
        """Return what `make()` returns: the tensors it made at an earlier step if nothing of `origin` has changed."""
        if step.run != self._run:
            self.clear()
            self._run, self._refusals = step.run, {}
            self.reused = self.computed = 0
        key = (site.name, step.branch)
        refusal = _refusal(step, origin)
        kept = self._kept.get(key)
        if kept is not None and not refusal and kept.origin.holds_for(origin.tensors):
            self.reused += 1
            return kept.values
        self._kept.pop(key, None)
        self.computed += 1
        values = make()
        size = _nbytes(values)
        if not refusal and self.nbytes + size > self.limit:
            refusal = f"more than {self.limit / 2**20:.0f} MiB"
        if refusal:
            self._refusals[refusal] = None
        else:
            self._kept[key] = _Kept(Unchanged(origin.tensors), values, size)
        return values

    def notes(self) -> list[str]:
        """Say in plain words what the last run reused, what is still held, and what was not kept and why."""
        if not self.reused + self.computed:
            return []
        held = f", {self.nbytes / 2**20:.1f} MiB held until the next run" if self._kept else ""
        lines = [f"text keys and values: {self.computed} computed, {self.reused} reused unchanged{held}"]
        return lines + [f"text keys and values not kept: {reason}" for reason in self._refusals]


def _refusal(step: StepInfo, origin: Origin) -> str:
    if step.index is None:
        return step.reason or "no step known"
    if torch.is_grad_enabled():
        return "gradients are on"
    if origin.tensors and torch.is_autocast_enabled(origin.tensors[0].device.type):
        return "autocast is on"
    return origin.unseen


def _nbytes(values: Values) -> int:
    """Bytes of the memory behind the tensors: a slice of a fused projection holds all of it."""
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
    return sum(storages.values())
