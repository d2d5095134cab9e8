"""From what was measured to what a profile says: by site and window one number a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import HeadChoice
from .choose import choose
from .seen import Seen, Windows


def options(
    seen: Seen, sites: Sequence[str], windows: Windows, choice: HeadChoice
) -> dict[str, tuple[tuple[int, ...] | None, ...]]:
    """Choose a pattern for the heads of all sites together, window by window; None for a site that was not seen.

    Losses and costs are means over runs and steps, all alike.
    """
    found: dict[str, list[tuple[int, ...] | None]] = {site: [None] * len(windows) for site in sites}
    for window in range(len(windows)):
        means = {}
        for site in sites:
            steps = [step for run in seen.of(site, window, windows).values() for step in run]
            if steps:
                means[site] = np.mean(steps, 0)
        if means:
            losses, costs = np.concatenate(list(means.values()), -1)
            numbers = iter(choose(choice, losses, costs).tolist())
            for site, mean in means.items():
                found[site][window] = tuple(next(numbers) for _ in range(mean.shape[-1]))
    return {site: tuple(values) for site, values in found.items()}


def floors(seen: Seen, sites: Sequence[str], windows: Windows) -> dict[str, tuple[tuple[float, ...] | None, ...]]:
    """Take for each head the mean of the run in which it is largest (SVOO, arXiv 2603.18636: over prompts)."""

    def of(site: str, window: int) -> tuple[float, ...] | None:
        runs = [np.mean(steps, 0) for steps in seen.of(site, window, windows).values()]
        return tuple(round(float(value), 4) for value in np.max(runs, 0)) if runs else None

    return {site: tuple(of(site, window) for window in range(len(windows))) for site in sites}
