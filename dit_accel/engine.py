"""What all attention sites of one acceleration share."""

from __future__ import annotations

from .call import Stage
from .config import Recipe
from .report import Ledger
from .sparsity.planner import Planner


class Engine:
    """Recipe, planner, ledger, and the stages that run before the plan."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.planner = Planner(recipe)
        self.ledger = Ledger(recipe)
        self.stages: tuple[Stage, ...] = ()
