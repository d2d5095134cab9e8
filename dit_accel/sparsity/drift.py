"""Axis 4: whether a sample has moved so far that its decision is out of date, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import TokenLayout
from . import rows

PROBES = 64  # tokens looked at


@dataclass(eq=False)
class Probe:
    """The queries and keys of a few tokens when each sample last decided, [B, tokens, 2 H, D].

    `moved` bool [B] is what the last call measured, on the host but perhaps not there yet: `event` says when.
    """

    seen: torch.Tensor
    moved: torch.Tensor | None = None
    event: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return self.seen.numel() * self.seen.element_size()

    def stale(self) -> list[int]:
        """List the samples that had moved too far at the call before: a step ago, so a GPU need not be waited for."""
        if self.moved is None:
            return []
        if self.event is not None:
            self.event.synchronize()
        return [row for row, moved in enumerate(self.moved.tolist()) if moved]

    def measure(self, now: torch.Tensor, limit: float) -> None:
        """Note which samples differ by more than `limit`, relative to their length; NaN counts as moved."""
        length = self.seen.flatten(1).float().norm(dim=-1)
        apart = (now - self.seen).flatten(1).float().norm(dim=-1)
        moved = ~(apart <= limit * length)
        if not moved.is_cuda:
            self.moved = moved
            return
        self.moved = torch.empty(moved.shape, dtype=torch.bool, pin_memory=True)
        self.moved.copy_(moved, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()


def look(layout: TokenLayout, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return the queries and keys of a few tokens spread over the grid, [B, tokens, 2 H, D]."""
    tokens = rows.sample(layout, PROBES, q.device)
    return torch.cat([q[:, tokens], k[:, tokens]], 2)
