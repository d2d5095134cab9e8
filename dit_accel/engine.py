"""What all attention sites of one acceleration share."""

from __future__ import annotations

from .call import Stage
from .config import Recipe
from .report import Ledger
from .sparsity.planner import Planner
from .textkv import TextKV


class Engine:
    """Recipe, planner, ledger, kept text keys and values, and the stages that run before the plan."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.planner = Planner(recipe)
        self.ledger = Ledger(recipe)
        self.text_kv = TextKV()
        self.stages: tuple[Stage, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps."""
        return self.planner.nbytes + self.text_kv.nbytes

    def clear(self) -> None:
        """Forget everything a run has left."""
        self.planner.clear()
        self.text_kv.clear()
