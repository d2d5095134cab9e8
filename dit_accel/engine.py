"""What all attention sites of one acceleration share."""

from __future__ import annotations

from .call import Stage, Watcher
from .config import Profile, Recipe
from .report import Ledger
from .sparsity.planner import Planner
from .textkv import TextKV


class Engine:
    """Recipe, planner, ledger, kept text keys and values, the stages before the plan and the watchers after it."""

    def __init__(self, recipe: Recipe, profile: Profile | None = None) -> None:
        self.recipe = recipe
        self.planner = Planner(recipe, profile)
        self.ledger = Ledger(recipe)
        self.text_kv = TextKV()
        self.stages: tuple[Stage, ...] = ()
        self.watchers: tuple[Watcher, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        return self.planner.nbytes + self.text_kv.nbytes

    def clear(self) -> None:
        """Forget everything a run has left."""
        self.planner.clear()
        self.text_kv.clear()
