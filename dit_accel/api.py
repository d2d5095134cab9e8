"""The front door: accelerate a pipeline, run a recipe on plain tensors, list recipes, find demo models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import torch

from .acceleration import Acceleration, refuse_if_live
from .attend import autocast_dtype, cast, run
from .call import AttentionCall, Site
from .config import Profile, Recipe
from .config.difference import first_difference
from .errors import ConfigError, UnsupportedError, nearest
from .layout import TokenLayout
from .sparsity.plan import Plan
from .sparsity.planner import Planner
from .sparsity.recipes import PRESETS, RECIPES, resolve
from .step import StepInfo

TESTED_DIFFUSERS = (0, 42)
_MODELS = Path(__file__).parent / "demo_models"

RecipeLike = str | Path | Mapping[str, Any] | Recipe


def accelerate(
    target: Any,
    recipe: RecipeLike | None = None,
    *,
    profile: Profile | str | Path | None = None,
    replace: bool = False,
    **overrides: Any,
) -> Acceleration:
    """Accelerate a diffusers pipeline, or a bare transformer, and return the handle that undoes and reports it.

    Args:
        target: a pipeline with a `transformer` (and `transformer_2`), or the transformer itself; then call
            `handle.step(index, total)` in your own loop.
        recipe: a recipe or preset name, a YAML/JSON file, a mapping, or a Recipe; without one, the profile's, or the
            preset "balanced".
        profile: what `calibrate` found for this model and recipe, or the file it was saved in.
        replace: restore an acceleration that the pipeline already carries instead of raising, once nothing else is
            wrong.
        overrides: settings of the recipe, such as `density=0.25`.

    Raises ConfigError, UnsupportedError or AlreadyAcceleratedError; then nothing was changed.
    """
    known = Profile.load(profile) if isinstance(profile, str | Path) else profile
    if known is not None and not isinstance(known, Profile):
        raise ConfigError(f"profile: expected a Profile or the file of one, got {type(known).__name__}.")
    if recipe is None:
        recipe = "balanced" if known is None else known.recipe
    settled = resolve(recipe, **overrides)
    transformers = transformers_of(target)
    _warn_of_untested_diffusers()
    if not replace:
        refuse_if_live(transformers)
    pipe = None if isinstance(target, torch.nn.Module) else target
    return Acceleration(pipe, transformers, settled, known)


def transformers_of(target: Any) -> dict[str, torch.nn.Module]:
    """Return the transformers of a pipeline, or the one handed over, by name; UnsupportedError where there is none."""
    if isinstance(target, torch.nn.Module):
        return {"transformer": _uncompiled(target)}
    names = ("transformer", "transformer_2")
    found = {name: getattr(target, name, None) for name in names}
    modules = {name: _uncompiled(module) for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not modules:
        parts = getattr(target, "components", None)
        held = f" (its parts: {', '.join(sorted(parts))})" if isinstance(parts, Mapping) else ""
        raise UnsupportedError(
            f"{type(target).__name__}{held} holds no diffusion transformer; expected a diffusers pipeline with a "
            "`transformer`, or a transformer."
        )
    return modules


def _uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside what `torch.compile(model)` makes, which calls it with its hooks and processors."""
    return getattr(module, "_orig_mod", module)


@lru_cache(maxsize=1)
def _warn_of_untested_diffusers() -> None:
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if version > TESTED_DIFFUSERS:
        warnings.warn(
            f"dit_accel was tested with diffusers up to {'.'.join(map(str, TESTED_DIFFUSERS))}, this is "
            f"{diffusers.__version__}; check the report, or compare with density=1.",
            stacklevel=3,
        )


@dataclass
class AttentionState:
    """What a stateful recipe remembers between calls of `attention` that belong to one denoising run.

    Each call counts as one step. Start a new run with a new state.
    """

    step: int = 0
    _planner: Planner | None = field(default=None, repr=False)

    def planner(self, recipe: Recipe) -> Planner:
        """Return the planner of this state; a state belongs to one recipe."""
        if self._planner is None:
            self._planner = Planner(recipe)
        if (own := self._planner.recipe) != recipe:
            found = first_difference(own, recipe, sorted(Recipe.model_fields, key="name".__eq__))  # the name last
            assert found is not None
            raise ConfigError(
                f"state: it belongs to recipe {own.name!r}, where {found[0]} is {found[1]}; "
                f"in recipe {recipe.name!r} it is {found[2]}. Begin a run with a new state."
            )
        return self._planner


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: TokenLayout, recipe: RecipeLike = ...,
    density: float | None = ..., scale: float | None = ..., key_bias: torch.Tensor | None = ...,
    state: AttentionState | None = ..., return_plan: Literal[False] = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: TokenLayout, recipe: RecipeLike = ...,
    density: float | None = ..., scale: float | None = ..., key_bias: torch.Tensor | None = ...,
    state: AttentionState | None = ..., return_plan: Literal[True],
) -> tuple[torch.Tensor, Plan]: ...  # fmt: skip
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    recipe: RecipeLike = "grat",
    density: float | None = None,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    state: AttentionState | None = None,
    return_plan: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Plan]:
    """Run a recipe on plain tensors, outside diffusers.

    `q`, `k`, `v` [B, S, H, D], any strides, S as `layout` says; `key_bias` [B|1, H|1, S] is added to the logits
    (-inf masks a key). Returns [B, S, H, D], and the Plan with `return_plan`. The recipe's dense steps and layers
    belong to a pipeline and do not apply. Without a `state` a recipe that reuses decisions makes a new one.
    Raises ConfigError where shapes and layout disagree.
    """
    settled = resolve(recipe, density=density).override(dense_steps=0, dense_layers=0, adaptive=False)
    if not (q.ndim == 4 and q.shape == k.shape == v.shape):
        raise ConfigError(
            f"attention: expected q, k, v alike as [B, S, H, D], got {[tuple(x.shape) for x in (q, k, v)]}."
        )
    if q.shape[3] == 0:
        raise ConfigError(f"attention: heads must be at least one wide, got q, k, v of {list(q.shape)}.")
    if q.shape[1] != layout.length:
        raise ConfigError(f"attention: q has {q.shape[1]} tokens, but the layout {layout} has {layout.length}.")
    _check_bias(key_bias, q)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (cast(x, dtype) for x in (q, k, v))
    with nullcontext() if dtype is None else torch.autocast(q.device.type, enabled=False):
        out, plan = _attend(settled, q, k, v, layout, scale, key_bias, state or AttentionState())
    return (out, plan) if return_plan else out


def _attend(
    recipe: Recipe,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    scale: float | None,
    key_bias: torch.Tensor | None,
    state: AttentionState,
) -> tuple[torch.Tensor, Plan]:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    step = StepInfo(run=1, index=state.step, total=None, branch="0")
    state.step += 1
    call = AttentionCall(_PLAIN, step, layout, q, k, v, factor, stock=_never, key_bias=key_bias)
    full = recipe.density == 1 or 0 in q.shape  # of no samples or heads nothing can be chosen
    plan = Plan(q.shape[1], q.shape[1]) if full else state.planner(recipe).plan(call)
    if plan.dense:
        mask = None if key_bias is None else key_bias[:, :, None].to(q.dtype)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=factor).transpose(1, 2)
    else:
        out = run(plan, q, k, v, factor, key_bias)
    return out, plan


def _check_bias(bias: torch.Tensor | None, q: torch.Tensor) -> None:
    if bias is None:
        return
    b, s, h, _ = q.shape
    fits = bias.ndim == 3 and bias.shape[0] in (1, b) and bias.shape[1] in (1, h) and bias.shape[2] == s
    if not fits or not bias.dtype.is_floating_point:
        raise ConfigError(
            f"attention: key_bias is {list(bias.shape)} {bias.dtype}; expected [{b}|1, {h}|1, {s}] "
            "of a floating dtype, -inf where a key is masked."
        )


_PLAIN = Site("attention", "attention", 0, torch.nn.Identity())


def _never(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the functional door runs its own dense attention")


def recipes() -> dict[str, Recipe]:
    """Return every recipe and preset by name, with axes and sources."""
    return {**RECIPES, **PRESETS}


def demo_model(name: str = "emoji-flux") -> Path:
    """Return the folder of a model that ships inside the package, ready for diffusers' `from_pretrained`."""
    known = demo_models()
    if name not in known:
        raise ConfigError(f"demo_model: no model is called {name!r}.{nearest(name, known)}")
    return _MODELS / name


def demo_models() -> list[str]:
    """List the models that ship inside the package."""
    return sorted(p.name for p in _MODELS.iterdir() if (p / "model_index.json").is_file()) if _MODELS.is_dir() else []
