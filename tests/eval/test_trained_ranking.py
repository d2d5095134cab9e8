"""A ranking on the trained demo models, small enough for a CPU: what must hold of it whatever the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dit_accel.eval.store import load

RECIPES = ("svg-ear", "balanced", "draft", "grat-x")
DENSITIES = (0.5, 0.2)
PICTURE = ("--prompt", "taco, noto style", "--height", 128, "--width", 128, "--text-length", 32, "--steps", 8)
CLIP = (
    "--prompt", "a taco sliding left, noto style", "--height", 288, "--width", 352, "--frames", 33, "--steps", 6,
    "--guidance", 3, "--text-length", 32,
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("model", "call"), [("emoji-flux", PICTURE), ("emoji-wan", CLIP)])
def test_less_is_less_like_and_the_better_recipe_leads(
    cli: Callable[..., Result], tmp_path: Path, model: str, call: tuple[object, ...]
) -> None:
    output = tmp_path / "rows.jsonl"
    asked = [part for name in RECIPES for part in ("--recipe", name)]
    asked += [part for density in DENSITIES for part in ("--density", str(density))]
    result = cli("eval", "-o", output, "--model", model, *call, *asked, "--no-rivals", "--no-floors", "--looked", 0)
    assert result.exit_code == 0, result.output
    rows = load(output)[1]
    assert [row.error for row in rows if row.error] == []
    assert len(rows) == 1 + len(RECIPES) * len(DENSITIES)
    psnr = {row.candidate: row.figures.psnr for row in rows if row.figures is not None}
    spent = {row.candidate: row.density for row in rows}
    print(model, psnr, spent)
    for name in RECIPES:
        more, less = (psnr[f"{name}@{density:g}"] for density in DENSITIES)
        assert more is not None
        assert less is not None
        assert less < more, name
    for density in DENSITIES:
        ear, draft = (psnr[f"{name}@{density:g}"] for name in ("svg-ear", "draft"))
        assert ear is not None
        assert draft is not None
        assert ear > draft, density
