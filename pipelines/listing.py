"""The recipes and models there are, as plain data and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from dit_accel.api import demo_model, demo_models, recipes
from dit_accel.config import Recipe

from .doctor import Check

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def recipe_rows() -> list[dict[str, Any]]:
    """Describe every recipe and preset by its axes."""
    return [recipe_row(recipe) for recipe in recipes().values()]


def recipe_row(recipe: Recipe) -> dict[str, Any]:
    """Describe one recipe by its axes."""
    options = recipe.heads.options if recipe.heads else ()
    mixed = "" if recipe.total is None else " | ".join(dict.fromkeys(case.name or "" for case in recipe.cases))
    return {
        "name": recipe.name,
        "order": "by depth and step" if mixed else " | ".join(o.order.brief for o in options) or recipe.order.brief,
        "score": "sampled rows" if options else "" if recipe.select.geometric else recipe.score.brief,
        "select": mixed or " | ".join(o.select.brief for o in options) or recipe.select.brief,
        "correct": recipe.correct.brief if recipe.correct else "",
        "every": recipe.every,
        "dense_steps": recipe.dense_steps,
        "preset": recipe.adaptive,
        "sources": list(recipe.sources),
    }


def recipe_table() -> Table:
    """Return the recipes as a table."""
    table = _table("name", "order", "score", "select", "correct", "every", "dense steps", "source")
    table.columns[0].no_wrap = table.columns[-1].no_wrap = True
    for row in recipe_rows():
        _add(
            table,
            row["name"] + (" (preset)" if row["preset"] else ""),
            row["order"],
            row["score"],
            row["select"],
            row["correct"],
            str(row["every"]),
            f"first {row['dense_steps']:.0%}",
            "; ".join(source.split(", ")[-1] for source in row["sources"]),
        )
    return table


def model_rows() -> list[dict[str, Any]]:
    """Describe the models that ship with the package."""
    return [_model_row(name, demo_model(name)) for name in demo_models()]


def model_table() -> Table:
    """Return the shipped models as a table."""
    table = _table("name", "pipeline", "parts", "MiB", "folder")
    for row in model_rows():
        _add(table, row["name"], row["pipeline"], ", ".join(row["parts"]), f"{row['mib']:.1f}", row["path"])
    return table


def check_table(checks: list[Check]) -> Table:
    """Return a doctor's findings as a table."""
    table = _table("", "what", "found", "what to do")
    for check in checks:
        _add(table, Text(check.status, _COLORS[check.status]), check.name, check.found, check.advice)
    return table


def _model_row(name: str, folder: Path) -> dict[str, Any]:
    index: Mapping[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "name": name,
        "pipeline": index["_class_name"],
        "parts": [part for part, of in index.items() if not part.startswith("_") and of != [None, None]],
        "mib": size / 2**20,
        "path": str(folder),
    }


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row of plain text: a path may hold what rich would read as markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
