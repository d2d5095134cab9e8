"""diffusers' own caches as rivals: put on a transformer, taken off without a trace, refused with the reason."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dit_accel.errors import DitAccelError, UnsupportedError

FIRST_BLOCK = (0.05, 0.15)
TAYLOR_INTERVALS = (2, 4)
MAG_THRESHOLDS = (0.06, 0.24)
# diffusers' own pattern ends in "attn", which no module of Wan does: its blocks have attn1 and attn2
ATTENTIONS = (r".*blocks\.\d+\.attn\d?",)
_TRACES = ("forward", "_diffusers_hook")  # what diffusers leaves on modules after disable_cache()


@dataclass(frozen=True)
class Cache:
    """One cache with its settings; `config` makes diffusers' own object anew for each run."""

    name: str
    settings: dict[str, Any]
    config: Callable[[], Any]


def caches(steps: int, dense_steps: float, calibrate: Callable[[], list[float]]) -> list[Cache]:
    """Return the caches to try in a run of `steps`; `calibrate` gives MagCache its ratios when they are needed first.

    FirstBlockCache has no setting for first steps in full; the other two take as many as the recipes keep dense.
    """
    from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

    first = int(dense_steps * steps + 0.5)
    found = []
    for threshold in FIRST_BLOCK:
        settings: dict[str, Any] = {"threshold": threshold}
        found.append(Cache(f"first-block-{threshold:g}", settings, partial(FirstBlockCacheConfig, **settings)))
    for interval in TAYLOR_INTERVALS:
        settings = {"cache_interval": interval, "disable_cache_before_step": max(first, 2)}  # two for a difference
        hooked = {"cache_identifiers": list(ATTENTIONS), "taylor_factors_dtype": torch.float32}
        make = partial(TaylorSeerCacheConfig, **settings, **hooked)
        found.append(Cache(f"taylorseer-{interval}", settings, make))
    for threshold in MAG_THRESHOLDS:
        settings = {"threshold": threshold, "retention_ratio": dense_steps, "num_inference_steps": steps}
        found.append(Cache(f"magcache-{threshold:g}", settings, partial(_mag_config, settings, calibrate)))
    return found


@contextmanager
def cached(transformer: Any, cache: Cache) -> Iterator[None]:
    """Run a block with a cache on; afterwards the modules carry what they carried. Raises UnsupportedError."""
    if not hasattr(transformer, "enable_cache"):
        raise UnsupportedError(f"{type(transformer).__name__} takes none of diffusers' caches.")
    before = {id(module): set(vars(module)) & set(_TRACES) for module in transformer.modules()}
    try:
        try:
            transformer.enable_cache(cache.config())
        except DitAccelError:
            raise
        except Exception as error:  # each cache fails in its own way on a model it does not know
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnsupportedError(f"{type(transformer).__name__} does not take {cache.name}: {reason}") from error
        parts = [module for module in transformer.modules() if module is not transformer]  # itself is marked anyway
        if all(set(vars(part)) & set(_TRACES) == before[id(part)] for part in parts):
            raise UnsupportedError(f"{type(transformer).__name__} does not take {cache.name}: it changes no module.")
        yield
    finally:
        _take_off(transformer, before)


def mag_ratios(transformer: Any, steps: int, draw: Callable[[], object]) -> list[float]:
    """Return MagCache's ratios of one calibration run, which `draw` makes; branches are averaged.

    diffusers prints them and keeps no copy, so they are read from what it prints.
    """
    from diffusers.hooks import MagCacheConfig

    settings = {"calibrate": True, "num_inference_steps": steps}
    printed = io.StringIO()
    config = partial(MagCacheConfig, **settings)
    with cached(transformer, Cache("magcache", settings, config)), contextlib.redirect_stdout(printed):
        draw()
    found = [json.loads(line) for line in re.findall(r"^\[[-+\d., e]+\]$", printed.getvalue(), re.MULTILINE)]
    if not found or any(len(ratios) != steps for ratios in found):
        raise UnsupportedError("MagCache: diffusers' calibration gave no ratios for this model.")
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def _mag_config(settings: dict[str, Any], calibrate: Callable[[], list[float]]) -> Any:
    from diffusers.hooks import MagCacheConfig

    return MagCacheConfig(**settings, mag_ratios=calibrate())


def _take_off(transformer: Any, before: dict[int, set[str]]) -> None:
    if getattr(transformer, "is_cache_enabled", False):
        transformer.disable_cache()
    for module in transformer.modules():
        for name in set(_TRACES) - before.get(id(module), set()):
            vars(module).pop(name, None)
    vars(transformer).pop("_cache_config", None)
