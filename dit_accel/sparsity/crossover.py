"""When sparse is slower than dense: a measured table that presets ask before they leave dense."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

TABLE = Path(__file__).with_name("crossover.json")


@lru_cache(maxsize=1)
def table() -> dict[str, list[dict[str, float]]]:
    """Return the measured rows per device type: tokens, density, dense_ms and sparse_ms of one attention call.

    Written by `eval/bench_crossover.py`; sparse_ms is a mean over a decision's life, with the decision in it.
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"]


@lru_cache(maxsize=1024)
def slower_reason(tokens: int, density: float | None, device: torch.device) -> str:
    """Say why dense is expected to be faster for such a call, '' where sparse is or nothing was measured."""
    rows = table().get(device.type, [])
    if not rows:
        return f"no measurement says that sparse is faster on {device.type}"
    gain = expected_gain(tokens, _asked(density), rows)
    if gain > 1:
        return ""
    return f"{tokens} tokens: dense is faster on {device.type} (measured {gain:.2f}x)"


def crossover_tokens(density: float | None, device: torch.device) -> int | None:
    """Return from about how many tokens on sparse was measured to be faster; None where it never was, or all along."""
    rows = table().get(device.type, [])
    lengths = sorted({int(row["tokens"]) for row in rows})
    steps = [int(n) for a, b in pairwise(lengths) for n in np.geomspace(a, b, 33)]
    return next((n for n in steps[1:] if expected_gain(n, _asked(density), rows) > 1), None)


def _asked(density: float | None) -> float:
    return 0.3 if density is None else density  # rules by mass mostly come to less


def expected_gain(tokens: int, density: float, rows: list[dict[str, float]]) -> float:
    """Interpolate dense time over sparse time: along log tokens, at the next larger density measured."""
    measured = sorted({row["density"] for row in rows})
    at = next((d for d in measured if d >= density - 1e-9), measured[-1])
    line = sorted((row["tokens"], row["dense_ms"] / row["sparse_ms"]) for row in rows if row["density"] == at)
    return float(np.interp(np.log(tokens), np.log([t for t, _ in line]), [g for _, g in line]))
