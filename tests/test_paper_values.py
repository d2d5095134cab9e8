"""The table of the papers' values per model in docs/recipes.md: every line of it runs, and asks for what it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel.config import AXES, Recipe

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
TABLE = PAGE.split("### The papers' values per model\n")[1].split("\n### ")[0]
LINES = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| recipe |")]
LAYOUT = dit_accel.TokenLayout(grid=(3, 8, 10), text=4)


@pytest.fixture(scope="module")
def transformer() -> Any:
    return tiny.flux()[0].transformer


def asked(line: str) -> tuple[str, dict[str, Any]]:
    """Return the recipe and the overrides of a line's call."""
    (code,) = re.findall(r"`(accelerate\(pipe, .*\))` \|$", line)
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    _, name = call.args
    return ast.literal_eval(name), {str(given.arg): ast.literal_eval(given.value) for given in call.keywords}


def setting(recipe: Recipe, name: str) -> Any:
    data = recipe.model_dump()
    if name == "density":
        return recipe.density
    return data[name] if name in data else next(data[axis][name] for axis in AXES if name in (data[axis] or {}))


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split(" | ")[:2])[2:])
def test_a_line_runs_and_means_what_it_says(line: str, transformer: Any) -> None:
    name, overrides = asked(line)
    assert line.startswith(f"| {name} |")
    with dit_accel.accelerate(transformer, name, **overrides) as handle:
        recipe = handle.recipe
    for key, value in overrides.items():
        if not isinstance(value, dict | list):
            assert setting(recipe, key) == value, key
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, LAYOUT.length, 2, 16, generator=make) for _ in range(3))
    assert dit_accel.attention(q, k, v, layout=LAYOUT, recipe=recipe).isfinite().all()


def test_the_table_is_there() -> None:
    assert len(LINES) > 30
    assert {"radial", "draft", "svoo", "svg2", "jenga", "rectified"} <= {asked(line)[0] for line in LINES}
