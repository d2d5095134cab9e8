"""The precision axis: settings, what runs, what the report says, and that corrections merge with it exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel.attend import run
from dit_accel.errors import ConfigError
from dit_accel.sparsity.recipes import resolve

LAYOUT = dit_accel.TokenLayout(grid=(1, 12, 10), text=6, text_first=True)
SMALL: dict[str, Any] = {"density": 0.5, "block_q": 16, "block_k": 16}


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 2, LAYOUT.length, 3, 32, generator=torch.Generator().manual_seed(0))
    return q, k + 4.0, v


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["draft", "sparge", "gna", "svg-ear", "rectified", "delta", "rettention"])
def test_rounding_moves_an_output_by_little(name: str) -> None:
    """With branches over pooled keys, predicates and fixes beside the rounded branch."""
    q, k, v = qkv()
    recipe = resolve(name, **SMALL)
    given, plan = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=recipe, return_plan=True)
    rounded = run(replace(plan, precision="int8"), q, k, v)
    assert 0 < apart(rounded, given) < 2e-2


def test_a_recipe_carries_its_precision() -> None:
    q, k, v = qkv()
    recipe = resolve("draft", precision="int8", **SMALL)
    out, plan = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=recipe, return_plan=True)
    assert plan.precision == "int8"
    assert torch.equal(out, run(plan, q, k, v))
    given = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=resolve("draft", **SMALL))
    assert 0 < apart(out, given) < 2e-2


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: draft\nname: mine\nprecision: int8\ncases:\n  - {layers: '0:1', precision: as given}\n")
    recipe = resolve(file)
    assert recipe.at(0, 4, 0.5).precision == "as given"
    assert recipe.at(1, 4, 0.5).precision == "int8"
    assert resolve("draft").precision == "as given"
    with pytest.raises(ConfigError, match="precision: input should be 'as given' or 'int8', got 'int4'"):
        resolve("draft", precision="int4")
    with pytest.raises(ConfigError, match="select 'agents' goes through tokens that are computed as given"):
        resolve("agent", precision="int8")


@torch.no_grad()
def test_the_report_says_which_calls_were_rounded() -> None:
    pipe, call = tiny.flux()
    cases = ({"layers": "0:1", "precision": "as given"},)
    with dit_accel.accelerate(pipe, "draft", dense_steps=0, precision="int8", cases=cases, **SMALL) as handle:
        rounded = tiny.generate(pipe, call)
        kernels = {row.group: row.kernel for row in handle.report().rows if row.kind == "sparse"}
    assert kernels == {"transformer_blocks": "cpu", "single_transformer_blocks": "cpu int8"}
    with dit_accel.accelerate(pipe, "draft", dense_steps=0, **SMALL):
        given = tiny.generate(pipe, call)
    assert 0 < apart(rounded, given) < 2e-2
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, "draft", precision="int8", **{**SMALL, "density": 1.0}):
        assert torch.equal(tiny.generate(pipe, call), stock)
