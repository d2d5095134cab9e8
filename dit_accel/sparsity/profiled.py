"""The recipe in force at a site and a share of the run where a calibration profile speaks."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from ..call import Site
from ..config import Profile, Recipe

FOREVER = 1_000_000  # steps between decisions that look at places alone


class Profiled:
    """A recipe with a profile beside it: what is found once for a site and window is looked up from then on."""

    def __init__(self, recipe: Recipe, profile: Profile) -> None:
        self.profile = profile
        self._recipe = recipe
        self._found: dict[tuple[str, int], Recipe] = {}

    def window(self, share: float) -> int:
        """Return the window of the run that a share of it lies in."""
        return bisect_right(self.profile.windows, share) - 1

    def at(self, site: Site, share: float) -> Recipe:
        """Return the recipe in force: what the profile found, or the recipe's own rule where it has seen nothing."""
        key = (site.name, self.window(share))
        if key not in self._found:
            self._found[key] = self._settled(*key)
        return self._found[key]

    def _settled(self, site: str, window: int) -> Recipe:
        windows = self.profile.values.get(site)
        values = None if windows is None else windows[window]
        if values is None:
            return self._recipe
        changes: dict[str, Any] = {}
        choice = self.profile.choice
        if self.profile.options is not None and choice is not None:
            changes["heads"] = choice.model_copy(update={"given": tuple(values)})
            if all(option.select.geometric for option in choice.options):
                changes["every"] = FOREVER
        else:
            low, high = self.profile.clamp or (0.0, 1.0)
            floors = tuple(min(max(value, low), high) for value in values)
            changes["select"] = self._recipe.select.model_copy(update={"least": floors})
        # copied without checks: recipe and profile were checked when they were read
        return self._recipe.model_copy(update=changes)
