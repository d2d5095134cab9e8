"""Clocks for one denoising step: stretches on a device, the attentions inside, and scaling to the full depth."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Stopwatch:
    """Time named stretches on a device, in ms: by events on a GPU, which do not make it wait, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what runs inside the `with` block."""
        start = self.mark()
        yield
        self.add(name, start)

    def add(self, name: str, start: Any) -> None:
        """End a stretch that began at `start`."""
        self._spans[name].append((start, self.mark()))

    def mark(self) -> Any:
        """Return a point in time."""
        if not self._cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, list[float]]:
        """Return all stretches so far and forget them; on a GPU this waits for it."""
        if self._cuda:
            torch.cuda.synchronize()
        spans, self._spans = self._spans, defaultdict(list)
        return {k: [a.elapsed_time(b) if self._cuda else b - a for a, b in pairs] for k, pairs in spans.items()}


class AttentionClock(TorchFunctionMode):
    """Time the attentions over the whole sequence; `kind` is the group of blocks that runs."""

    def __init__(self, watch: Stopwatch, tokens: int) -> None:
        super().__init__()
        self.watch, self.tokens, self.kind = watch, tokens, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        if q.shape[-2] != self.tokens or k.shape[-2] != self.tokens:
            return func(*args, **kwargs)
        with self.watch.span(f"attention {self.kind}"):
            return func(*args, **kwargs)


@dataclass(frozen=True)
class StepTime:
    """A step of the full depth and the attention in it, ms; `layer`: one attention of the first kind of block."""

    step: float
    attention: float = 0.0
    layer: float = 0.0


def extrapolate(spans: Mapping[str, Sequence[float]], groups: Mapping[str, int], layers: int) -> StepTime:
    """Scale measured spans to the full depth.

    `spans`: "forward", each group's name for its blocks, and "attention <group>" where it was timed, in ms.
    `groups`: real depth by group; `layers`: blocks built of each.
    """
    block = {name: statistics.median(spans[name]) for name in groups}
    attention = {name: statistics.median(spans.get(f"attention {name}", [0.0])) for name in groups}
    rest = max(0.0, statistics.median(spans["forward"]) - layers * sum(block.values()))
    return StepTime(
        step=rest + sum(block[name] * depth for name, depth in groups.items()),
        attention=sum(attention[name] * depth for name, depth in groups.items()),
        layer=next(iter(attention.values())),
    )
