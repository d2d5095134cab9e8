"""What a calibration has measured, by run, site and step, and the windows it is settled for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.float64]
Windows = tuple[float, ...]


class _Mean:
    """The mean of tensors, on their device until it is asked for."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._count = 0

    def add(self, value: torch.Tensor) -> None:
        value = value.float()
        self._total = value if self._total is None else self._total + value
        self._count += 1

    def get(self) -> Numbers:
        assert self._total is not None
        return (self._total / self._count).cpu().numpy()


class Seen:
    """Measurements of attention calls; those of one run, site and step (guidance branches) count as one, their mean."""

    def __init__(self) -> None:
        self._means: dict[str, dict[tuple[int, float], _Mean]] = defaultdict(lambda: defaultdict(_Mean))

    def add(self, site: str, run: int, share: float, value: torch.Tensor) -> None:
        """Note what a call showed, at a share of its run; nothing is read from the device."""
        self._means[site][run, share].add(value)

    def __bool__(self) -> bool:
        return bool(self._means)

    @property
    def shares(self) -> set[float]:
        """Where in a run something was seen."""
        return {share for means in self._means.values() for _, share in means}

    def of(self, site: str, window: int, windows: Windows) -> dict[int, list[Numbers]]:
        """Return what a site showed in a window, the steps of each run."""
        start, end = (*windows, float("inf"))[window : window + 2]
        found: dict[int, list[Numbers]] = defaultdict(list)
        for (run, share), mean in self._means.get(site, {}).items():
            if start <= share < end:
                found[run].append(mean.get())
        return found


def cut(shares: Iterable[float], count: int, first: float) -> Windows:
    """Return where each window of the run begins, as shares of it.

    What comes after the `first` share, which is dense, is cut evenly into `count`, or into as many as leave none
    without a step. What is seen before belongs to the first window.
    """
    seen: Any = np.array(sorted(shares))
    for n in range(count, 1, -1):
        starts = (0.0, *(round(first + (1 - first) * i / n, 6) for i in range(1, n)))
        if all(((seen >= a) & (seen < b)).any() for a, b in pairwise((*starts, 2.0))):
            return starts
    return (0.0,)
