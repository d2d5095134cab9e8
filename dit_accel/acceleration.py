"""The handle of one accelerated pipeline: undo, report, and which handles are live."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from .attachment import Attachment
from .call import Site, Stage, Watcher
from .config import Profile, Recipe
from .engine import Engine
from .errors import AlreadyAcceleratedError, ConfigError, UnsupportedError, nearest
from .explain import Explanation
from .hosts import Family, all_families, family_of
from .report import Report
from .sparsity.draw import Cell
from .sparsity.planner import Planner
from .step import StepTracker
from .whole import three_whole, whole

# A handle holds its transformers, so it is held weakly here and strongly by their attachments: all of them go together.
_LIVE: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Acceleration]] = weakref.WeakKeyDictionary()


class Acceleration:
    """The handle that `accelerate` returns: undo, report, and the step of the user's own loop.

    It takes the place of those that the transformers carry, which are restored, and which stay where it cannot. Usable
    as a context manager that restores on exit.
    """

    def __init__(
        self,
        pipe: Any | None,
        transformers: Mapping[str, torch.nn.Module],
        recipe: Recipe,
        profile: Profile | None = None,
    ) -> None:
        self.recipe = recipe
        self.profile = profile
        self._engine = Engine(recipe, profile)
        self._tracker = StepTracker(pipe)
        several = len(transformers) > 1
        self._attachments = [
            Attachment(module, known_family(module), self._engine, self._tracker, f"{name}." if several else "")
            for name, module in transformers.items()
        ]
        _refuse_if_nothing_can_be_sparse(self._attachments)
        if profile is not None:
            profile.check_recipe(recipe)
            profile.check_model(self.models, self.heads)
        found = {live_handle(module): None for module in transformers.values()}  # one may have accelerated several
        earlier = [handle for handle in found if handle is not None]
        for handle in earlier:
            handle.restore()
        try:
            self._attach()
        except BaseException:
            for handle in earlier:
                handle._attach()
            raise

    def _attach(self) -> None:
        """Attach to all transformers, or to none."""
        self._live = True
        try:
            for attachment in self._attachments:
                attachment.attach(self)
                _LIVE[attachment.transformer] = weakref.ref(self)
        except BaseException:
            self.restore()
            raise

    @property
    def live(self) -> bool:
        """Whether the acceleration is still attached."""
        return self._live

    @property
    def sites(self) -> list[Site]:
        """All attention sites found, those that stay dense included."""
        return [site for attachment in self._attachments for site in attachment.sites]

    @property
    def models(self) -> list[str]:
        """The classes of the transformers."""
        return [type(attachment.transformer).__name__ for attachment in self._attachments]

    @property
    def heads(self) -> dict[str, int | None]:
        """The heads of each attention site, by its name; None where the module does not say."""
        return {site.name: getattr(site.module, "heads", None) for site in self.sites}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What runs on each sparse-eligible call before the plan: completed keys and values, editing controls."""
        return self._engine.stages

    @stages.setter
    def stages(self, stages: tuple[Stage, ...]) -> None:
        self._engine.stages = tuple(stages)

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """What sees each sparse-eligible call after it ran: the call, its plan and its output, none to be changed."""
        return self._engine.watchers

    @watchers.setter
    def watchers(self, watchers: tuple[Watcher, ...]) -> None:
        self._engine.watchers = tuple(watchers)

    @property
    def planner(self) -> Planner:
        """What decides which pairs a call computes; another one may be set before a run, such as an oracle."""
        return self._engine.planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._engine.planner = planner

    def step(self, index: int, total: int, branch: str | None = None) -> None:
        """Say where your own denoising loop stands, before each transformer call; index counts from 0.

        `branch` names the guidance branch of the call. Raises ConfigError for a place outside the run, for what is no
        number or name, and once restored.
        """
        self._refuse_if_restored("step")
        if branch is not None and not isinstance(branch, str):
            raise ConfigError(f"step: branch is a name, such as 'cond', got {branch!r}.")
        self._tracker.set_manual(whole(index, "step: index"), whole(total, "step: total"), branch)

    def explain(self, site: int | str, step: int, query: Cell | None = None) -> Explanation:
        """Ask what one attention call does against what it should do; the next run that gets there fills the answer.

        `site` is a number as `sites` counts them, or a name, `step` counts from 0. `query`: the (frame, row, column) of
        the grid whose keys are drawn, None the middle one. Raises ConfigError for a site that is not there, and for
        what is no whole number.
        """
        self._refuse_if_restored("explain")
        asked = None if query is None else three_whole(query, "explain: query", "(frame, row, column)")
        return Explanation(self._engine, self._site(site), whole(step, "explain: step"), asked)

    def _refuse_if_restored(self, asked: str) -> None:
        if not self._live:
            raise ConfigError(f"{asked}: this acceleration was restored, so nothing runs under it any more.")

    def _site(self, named: int | str) -> Site:
        sites = self.sites
        if isinstance(named, str):
            found = next((site for site in sites if site.name == named), None)
            if found is None:
                names = [site.name for site in sites]
                raise ConfigError(f"explain: no site is called {named!r}.{nearest(named, names)}")
            return found
        at = whole(named, "explain: site")
        if not 0 <= at < len(sites):
            raise ConfigError(f"explain: site must lie in 0..{len(sites) - 1}, got {at}.")
        return sites[at]

    def restore(self) -> None:
        """Undo everything; safe to call twice and in any order with other accelerations."""
        for attachment in self._attachments:
            attachment.detach()
            if live_handle(attachment.transformer) is self:
                del _LIVE[attachment.transformer]
        self._engine.clear()
        self._live = False

    def report(self) -> Report:
        """Return what was done in the last run."""
        blocked = {name: why for attachment in self._attachments for name, why in attachment.blocked.items()}
        mixed = () if self.recipe.total is None else (self.recipe.mixture_note,)
        faithful = (self.recipe.faithful_note,) if self.recipe.faithful else ()
        notes = (*mixed, *faithful, *self._profile_notes(), *self._engine.text_kv.notes())
        return self._engine.ledger.report(blocked, self._engine.nbytes, notes)

    def _profile_notes(self) -> tuple[str, ...]:
        if self.profile is None:
            return ()
        made, what = self.profile.made, "floors" if self.profile.options is None else "patterns"
        return (f"{what} of heads by a profile made on {made.layout} in {made.steps} steps",)

    def __enter__(self) -> Acceleration:
        self._refuse_if_restored("with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "live" if self._live else "restored"
        return f"<Acceleration {self.recipe.name!r}, {len(self.sites)} attention sites, {state}>"


def live_handle(transformer: torch.nn.Module) -> Acceleration | None:
    """Return the acceleration a transformer carries, None if it carries none."""
    handle = _LIVE.get(transformer)
    return None if handle is None else handle()


def refuse_if_live(transformers: Mapping[str, torch.nn.Module]) -> None:
    """Raise AlreadyAcceleratedError when one of the transformers is accelerated."""
    for name, module in transformers.items():
        handle = live_handle(module)
        if handle is not None:
            raise AlreadyAcceleratedError(
                f"{name} is already accelerated by {handle!r}; call its restore() first or pass replace=True."
            )


def known_family(transformer: torch.nn.Module) -> Family:
    """Return the family of a transformer; raise UnsupportedError where it is not known, or cached by diffusers."""
    family = family_of(transformer)
    if family is None:
        known = sorted(name for f in all_families() for name in f.classes)
        raise UnsupportedError(
            f"{type(transformer).__name__} is no transformer whose token layout is known. Known: {', '.join(known)}."
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise UnsupportedError(
            f"{type(transformer).__name__} has a diffusers cache enabled; call disable_cache() first: "
            "two accelerators on one model would skip work on top of each other."
        )
    return family


def _refuse_if_nothing_can_be_sparse(attachments: list[Attachment]) -> None:
    if any(len(a.blocked) < len(a.sites) for a in attachments):
        return
    reasons = sorted({why for a in attachments for why in a.blocked.values()}) or ["no attention sites were found"]
    raise UnsupportedError("nothing can be accelerated here: " + "; ".join(reasons) + ".")
