"""Who takes part in a study: recipes and the oracle, noise floors, fewer steps, diffusers' caches.

A candidate is applied for one generation and undone after it, so that none sees what another left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_accel import accelerate, recipes
from dit_accel.acceleration import Acceleration
from dit_accel.config import Profile, Recipe
from dit_accel.errors import ConfigError
from dit_accel.pipelines.settings import Settings
from dit_accel.sparsity.recipes import resolve

from .oracle import OraclePlanner
from .rivals import Cache, cached
from .store import Family

ORACLE, ORACLE_BLOCKS = "oracle", "draft"
ALL = "all"
STEP_SHARES = (0.75, 0.5)


@dataclass(frozen=True)
class Course:
    """What one generation runs with: the pipeline, its settings, and the handle if it is accelerated."""

    pipe: Any
    settings: Settings
    handle: Acceleration | None = None


@dataclass(frozen=True)
class Candidate:
    """One entry of a study. `definition` is what it is, as plain data, compared when a study goes on."""

    name: str
    family: Family
    definition: Mapping[str, Any] = field(default_factory=dict)
    asked: float | None = None

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        """Put it in place; this base is the stock pipeline, which is the reference."""
        yield Course(pipe, settings)


REFERENCE = Candidate("reference", "reference")


@dataclass(frozen=True)
class Sparse(Candidate):
    """A recipe, as it is or with a calibration profile, or the oracle of a recipe's blocks."""

    recipe: Recipe | None = None
    profile: Profile | None = None

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        assert self.recipe is not None
        with accelerate(pipe, self.recipe, profile=self.profile) as handle:
            if self.family == ORACLE:
                handle.planner = OraclePlanner(self.recipe)
            yield Course(pipe, settings, handle)


@dataclass(frozen=True)
class FewerSteps(Candidate):
    """The stock pipeline in fewer steps: what anyone can do without us."""

    steps: int = 1

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        yield Course(pipe, settings.model_copy(update={"steps": self.steps}))


@dataclass(frozen=True)
class Cached(Candidate):
    """One of diffusers' caches, with as many first steps computed in full as the recipes keep dense, where it can."""

    cache: Cache | None = None

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        assert self.cache is not None
        with cached(pipe.transformer, self.cache):
            yield Course(pipe, settings)


@dataclass(frozen=True)
class OtherAttention(Candidate):
    """A noise floor: torch's plain attention kernel in place of its fused one."""

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel([SDPBackend.MATH]):
            yield Course(pipe, settings)


@dataclass(frozen=True)
class OtherDtype(Candidate):
    """A noise floor: the same weights loaded anew in another precision."""

    load: Callable[[], Any] | None = None

    @contextmanager
    def applied(self, pipe: Any, settings: Settings) -> Iterator[Course]:
        assert self.load is not None
        other = self.load()
        other.set_progress_bar_config(disable=True)
        yield Course(other, settings)
        del other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def sparse_candidates(
    names: Sequence[str], densities: Sequence[float], dense_steps: float, dense_layers: int
) -> list[Candidate]:
    """Return densities x recipes, all with the same dense steps and layers.

    Among the names "oracle" is the oracle, and "all" stands for every recipe and the oracle. A recipe whose rule takes
    no density takes part once, as it is. Raises ConfigError.
    """
    found: dict[str, Candidate] = {}
    every = [one for given in names for one in (default_names() if given == ALL else [given])]
    for density in densities:  # outermost: where time runs out, what is there compares all recipes at one density
        for name in every:
            candidate = _sparse(name, density, dense_steps, dense_layers)
            found.setdefault(candidate.name, candidate)
    return list(found.values())


def definition_of(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data: what papers do with text only where it is faithful to them, else nobody does."""
    data = recipe.model_dump(mode="json")
    return data if recipe.faithful else {key: data[key] for key in data if key not in ("text", "faithful")}


def calibrated_candidates(files: Sequence[Path], dense_steps: float, dense_layers: int) -> list[Candidate]:
    """Return the recipe of each profile, calibrated, dense steps and layers as for the others. Raises ConfigError."""
    found: dict[str, Candidate] = {}
    for file in files:
        profile = Profile.load(file)
        recipe = profile.recipe.override(dense_steps=dense_steps, dense_layers=dense_layers, adaptive=False)
        asked = recipe.density
        name = f"{recipe.name}+profile" if asked is None else f"{recipe.name}@{asked:g}+profile"
        if name in found:
            raise ConfigError(f"profile {file}: another one is called {name} already; a study takes one of each.")
        mark = hashlib.sha256(profile.text().encode()).hexdigest()[:16]
        definition = {**definition_of(recipe), "profile": mark}
        found[name] = Sparse(name, "recipe", definition, asked, recipe, profile)
    return list(found.values())


def default_names() -> list[str]:
    """Return every recipe and the oracle; presets are recipes with other defaults, of which one is enough."""
    return [ORACLE, *(name for name, recipe in recipes().items() if not recipe.adaptive or name == "balanced")]


def _sparse(name: str, density: float, dense_steps: float, dense_layers: int) -> Candidate:
    family: Family = "oracle" if name == ORACLE else "recipe"
    named = ORACLE_BLOCKS if family == "oracle" else name
    base = resolve(named)
    asked = None if base.density is None and _takes_no_density(base) else density
    same = {"dense_steps": dense_steps, "dense_layers": dense_layers, "adaptive": False}
    recipe = resolve(named, density=asked).override(**same)
    label = ORACLE if family == "oracle" else base.name
    shown = label if asked is None else f"{label}@{asked:g}"
    return Sparse(shown, family, definition_of(recipe), asked, recipe)


def _takes_no_density(recipe: Recipe) -> bool:
    try:
        recipe.override(density=0.5)
    except ConfigError:
        return True
    return False


def fewer_steps(steps: int) -> list[Candidate]:
    """Return the stock pipeline in three quarters and in half of the steps."""
    counts = sorted({max(1, round(share * steps)) for share in STEP_SHARES} - {steps}, reverse=True)
    return [FewerSteps(f"steps-{count}", "steps", {"steps": count}, None, count) for count in counts]


def floors(dtype: str, load: Callable[[str], Any]) -> list[Candidate]:
    """Return the noise floors: the other precision of fp32 and bf16, and another attention kernel."""
    other = "bf16" if dtype == "fp32" else "fp32"
    return [
        OtherDtype(f"floor-{other}", "floor", {"dtype": other}, None, lambda: load(other)),
        OtherAttention("floor-sdpa-math", "floor", {"attention": "torch SDPA, math backend"}),
    ]
