"""Every recipe in pipelines: density, state, samples and branches, on sizes that divide by nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from restate import with_tiles

import dit_accel
from dit_accel.config import Recipe
from dit_accel.sparsity.recipes import resolve

NAMES = list(dit_accel.recipes())
ASKED = dict.fromkeys(NAMES, 0.3) | {"balanced": 0.2, "fast": 0.1}  # presets differ from one another in this alone


def small(name: str, **changes: Any) -> Recipe:
    """Return a recipe that has something to decide on some dozens of tokens and that decides from the first step."""
    recipe = resolve(name, density=ASKED[name], block_q=16, block_k=16, dense_steps=0, dense_layers=0)
    if recipe.total is None:  # a mixture is nothing but its cases
        recipe = recipe.override(cases=())
    recipe = with_tiles(recipe, (1, 4, 4), (1, 2, 3))
    if recipe.order.kind == "kmeans":
        recipe = recipe.override(queries=5, keys=14, first=3)
    if recipe.order.kind == "hilbert" and recipe.order.key_run:
        recipe = recipe.override(block_q=32, key_run=16)
    return recipe.override(**changes)


def missed(name: str, report: dit_accel.Report) -> bool:
    return abs(report.density / ASKED[name] - 1) > 0.2


def check_density(name: str, report: dit_accel.Report) -> None:
    """Take a miss only where the report says why, of this very density, and never all pairs."""
    why = [note for note in report.notes if note.startswith(f"asked density {ASKED[name]}")]
    assert report.density < 0.9, report
    assert not missed(name, report) or why, report


def batched(call: dict[str, Any], n: int) -> dict[str, Any]:
    return {**call, **{key: [call[key]] * n for key in ("prompt", "negative_prompt") if key in call}}


def guided(name: str, call: dict[str, Any], on: bool) -> dict[str, Any]:
    if name == "flux":
        return {**call, "negative_prompt": "a dog", "true_cfg_scale": 3.0 if on else 1.0}
    return {**call, "guidance_scale": 3.0 if on else 1.0}


LARGER = {"height": 208, "width": 240, "num_frames": 17}  # 5 x 13 x 15 tokens of Wan


@pytest.mark.parametrize("name", NAMES)
def test_alone_as_in_a_batch_and_twice_the_same(name: str) -> None:
    """Batch 2 with guidance: each item equals itself alone, and a second run in one process the first."""
    pipe, call = tiny.flux()
    call = guided("flux", {**call, "height": 34, "width": 26}, True)
    noise = torch.randn(2, 17 * 13, 4, generator=torch.Generator().manual_seed(3))
    with dit_accel.accelerate(pipe, small(name)) as handle:
        together = tiny.generate(pipe, batched(call, 2), latents=noise.clone())
        alone = tiny.generate(pipe, call, latents=noise[1:].clone())
        again = tiny.generate(pipe, batched(call, 2), latents=noise.clone())
        report = handle.report()
    assert torch.isfinite(together).all()
    assert torch.equal(together, again)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    assert report.sparse_calls > 0
    mixed = {"the recipe computes every pair here"} if small(name).total else set()  # a part may be computed in full
    assert {row.reason for row in report.rows} <= {"", "a full step measures what is missing", *mixed}
    check_density(name, report)


@pytest.mark.parametrize("name", NAMES)
def test_video_without_guidance(name: str) -> None:
    """On a clip that leaves every recipe room for its density; jenga needs most, a floor beside the touching blocks."""
    pipe, call = tiny.wan(heads=4)
    size = {"height": 208, "width": 304, "num_frames": 25} if name == "jenga" else LARGER
    call = {**guided("wan", call, False), **size}
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, with_tiles(small(name), (1, 4, 4), (2, 2, 4))) as handle:
        sparse = tiny.generate(pipe, call)
    report = handle.report()
    assert torch.isfinite(sparse).all()
    assert (sparse - stock).abs().max() > 1e-4  # rounding is a hundredth of that
    assert not missed(name, report), report


@pytest.mark.full
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [True, False])
def test_every_family(name: str, family: str, guidance: bool) -> None:
    pipe, call = tiny.FAMILIES[family]()
    call = call if family in ("qwen_image", "kontext") else guided(family, call, guidance)
    call = {**call, **LARGER} if family.startswith("wan") else call
    steps = {"steps": 4} if family == "wan_two_experts" else {}  # two for each expert: some corrections measure first
    with dit_accel.accelerate(pipe, small(name)) as handle:
        assert torch.isfinite(tiny.generate(pipe, call, **steps)).all()
    report = handle.report()
    assert report.sparse_calls > 0
    check_density(name, report)


STATEFUL = [name for name in NAMES if small(name).stateful]


def test_some_recipes_keep_state() -> None:
    assert {"svg2", "dfs", "adaspa", "sparse-vdit", "tidal", "quality", "balanced", "fast"} <= set(STATEFUL)


def often(name: str, every: int = 2) -> Recipe:
    """Return a recipe that keeps its decisions for some steps."""
    recipe = small(name)
    return recipe.override(every=every) if recipe.every == 1 and not recipe.decide_at else recipe


def roomy(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a tiny pipeline, and for clips a size at which decisions differ from run to run."""
    pipe, call = tiny.FAMILIES[family]()
    return pipe, {**call, **({"height": 144, "width": 176, "num_frames": 17} if family == "wan" else {})}


def first_run(name: str, family: str) -> torch.Tensor:
    pipe, call = roomy(family)
    with dit_accel.accelerate(pipe, often(name)):
        return tiny.generate(pipe, call, steps=4, seed=7)


KEEPING = [*STATEFUL, "auto"]  # whose cases keep something
OTHER = {"flux": {"height": 20, "width": 44}, "wan": {"height": 48, "width": 80, "num_frames": 5}}
FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, torch
from test_every_recipe import KEEPING, OTHER, first_run
torch.save({(name, family): first_run(name, family) for name in KEEPING for family in OTHER}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    """What another process makes: the first run of a pipeline for each recipe."""
    here, file = Path(__file__).parent, tmp_path_factory.mktemp("fresh") / "made.pt"
    command = [sys.executable, "-c", FRESH, str(here), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.parametrize("family", OTHER)
@pytest.mark.parametrize("name", KEEPING)
def test_a_later_run_equals_the_first_of_a_fresh_process(
    name: str, family: str, fresh: dict[tuple[str, str], torch.Tensor]
) -> None:
    """After a shorter run, another size and a cancelled run in the same process."""

    class Stop(Exception):
        pass

    def cancel(*_: Any) -> dict[str, Any]:
        raise Stop

    pipe, call = roomy(family)
    with dit_accel.accelerate(pipe, often(name)):
        tiny.generate(pipe, call, steps=2, seed=1)
        tiny.generate(pipe, call, steps=3, seed=2, **OTHER[family])
        with pytest.raises(Stop):
            tiny.generate(pipe, call, steps=4, seed=3, callback_on_step_end=cancel)
        assert torch.equal(tiny.generate(pipe, call, steps=4, seed=7), fresh[name, family])


@pytest.mark.parametrize("name", STATEFUL)
def test_guidance_branches_share_nothing(name: str) -> None:
    """With the negative prompt changed, what the positive branch keeps must stay as it was."""
    recipe = often(name, 4)
    kept = []
    for negative in ("a dog", "the red taco"):
        pipe, call = tiny.flux()
        call = {**call, "negative_prompt": negative, "true_cfg_scale": 3.0}
        with dit_accel.accelerate(pipe, recipe) as handle:
            tiny.generate(pipe, call, steps=1)
            planner = handle._engine.planner
            kept.append({**planner._kept, **planner._missing})
    assert {branch for _, branch in kept[0]} == {"cond", "uncond"}
    differs = False
    for key, old in kept[0].items():
        new = kept[1][key]
        pairs = list(zip(vars(old.warm).values(), vars(new.warm).values(), strict=True)) if old.warm else []
        pairs += [(old.plan.bits, new.plan.bits)] if old.plan else []
        pairs += [(old.missing.rest, new.missing.rest)] if old.missing else []
        same = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        assert pairs
        if key[1] == "cond":
            assert same
        differs |= not same
    assert differs or recipe.heads is not None  # few patterns: heads of both branches may choose alike


@pytest.mark.parametrize("name", [*STATEFUL, "hilbert-ear"])
def test_what_is_kept_is_what_was_declared(name: str) -> None:
    from dit_accel.layout import TokenLayout
    from dit_accel.sparsity.state import state_bytes

    recipe = often(name)
    layout = TokenLayout(grid=(1, 17, 19), text=7)
    q, k, v = (torch.randn(2, layout.length, 3, 16) for _ in range(3))
    state = dit_accel.AttentionState()
    dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state)
    planner = state._planner
    assert planner is not None
    declared = state_bytes(recipe, layout, batch=2, heads=3, dim=16)
    kept = sum(part.nbytes for part in (*planner._kept.values(), *planner._missing.values()))
    assert 0 < kept <= declared <= 1.1 * kept
