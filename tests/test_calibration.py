"""What a calibration finds in planted structure, what that is good for, and that the model is left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from planted import planted
from test_restore import snapshot

import dit_accel
from dit_accel.attend import run
from dit_accel.calibration import Calibration, calibrate
from dit_accel.call import AttentionCall
from dit_accel.config import Profile
from dit_accel.errors import AlreadyAcceleratedError, ConfigError, UnsupportedError
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16, "dense_steps": 0}
TALL = {"height": 160, "width": 96}  # 3 x 10 x 6 tokens of the tiny Wan
TILES = {"order": {"kind": "tile", "picture": (1, 4, 4), "video": (1, 2, 4)}}


# Planted structure -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "family", "looks", "found", "changes"),
    [
        ("paro", "flux", ("h", "w"), ({0, 2, 3}, {1, 4, 5}), {}),
        ("paro", "wan", ("f", "h", "w"), ({0, 1}, {2, 3}, {4, 5}), {}),
        ("svg1", "wan", ("f", "hw"), ({0}, {1}), {}),
        ("duo", "flux", ("hw", ""), ({0}, {1}), {"density": 0.7}),
        ("moa", "flux", ("hw", ""), ({0, 1, 2}, {3, 4}), {"sinks": 0, "density": 0.55}),
        ("sta", "flux", ("h", "w"), ({3, 10, 17}, {2, 9, 16}), {"density": 0.25}),
    ],
)
def test_planted_patterns_are_found(
    recipe: str, family: str, looks: tuple[str, ...], found: tuple[set[int], ...], changes: dict[str, Any]
) -> None:
    """Heads that look along rows, columns, frames or time get the pattern that holds what they see."""
    pipe, call = planted(family, looks)
    size = {"wan": TALL, "flux": {"height": 64, "width": 64} if recipe == "sta" else {}}[family]
    profile = settled(pipe, {**call, **size}, recipe, windows=1, **changes)
    assert profile.options is not None
    for (heads,) in profile.options.values():
        assert heads is not None
        assert all(head in expected for head, expected in zip(heads, found, strict=True)), profile.options


def test_heads_without_values_are_left_out_but_few() -> None:
    """Two of 34 heads have no values: leaving them out costs nothing, but 3 % are one."""
    pipe, call = planted("wan", ["f", "hw", *["f"] * 15], silent=[(0, 3), (1, 5)])
    profile = settled(pipe, {**call, **TALL}, "sparse-vdit")
    assert profile.options is not None
    numbers = [number for (heads,) in profile.options.values() for number in heads or ()]
    assert len(numbers) == 34
    assert [i for i, number in enumerate(numbers) if number == 1] in ([3], [22])
    assert numbers[:2] == numbers[17:19] == [2, 3]


@pytest.mark.parametrize(
    ("family", "looks", "seen"),
    [("flux", ("h", "w", "hw", ""), (13, 17, 1, 221)), ("wan", ("f", "h", "hw", ""), (60, 18, 3, 180))],
)
def test_planted_floors_are_found(family: str, looks: tuple[str, ...], seen: tuple[int, ...]) -> None:
    """A head that looks at n tokens alike needs the fewest that are 95 % of them; text does not count."""
    pipe, call = planted(family, looks)
    call = {**call, **(TALL if family == "wan" else {})}
    profile = settled(pipe, call, "svg2")
    cells = {"flux": 221, "wan": 180}[family]
    expected = [math.ceil(0.95 * n - 1e-6) / cells for n in seen]
    assert profile.floors is not None
    for windows in profile.floors.values():
        assert all(list(heads or ()) == pytest.approx(expected, abs=6e-3) for heads in windows)


def settled(pipe: Any, call: dict[str, Any], recipe: str, windows: int | None = None, **changes: Any) -> Profile:
    """Calibrate a tiny pipeline in two steps on its own prompt."""
    pipe.set_progress_bar_config(disable=True)
    tiles = TILES if recipe == "sta" else {}
    rest = {key: value for key, value in call.items() if key != "prompt"}
    overrides = {**SMALL, **tiles, **changes}
    if recipe == "sta":
        overrides = {**overrides, "search": tiled(float(changes.get("density", 0.2)))}
    asked = {"overrides": overrides, "windows": windows, "num_inference_steps": 2}
    return calibrate(pipe, recipe, [call["prompt"]], **{**asked, **rest})


def tiled(budget: float) -> dict[str, Any]:
    """The windows of `sta` on small tiles."""
    search = resolve("sta").search
    assert search is not None
    options = [{**option.model_dump(), "order": TILES["order"]} for option in search.options]
    return {**search.model_dump(), "options": options, "budget": budget}


# What it is good for ------------------------------------------------------------------------------------------------
def on_its_own_run(name: str, **changes: Any) -> tuple[Errors, Errors]:
    """What a recipe does online, and what its profile does, on the very calls that the profile was made from.

    All queries are looked at, one guidance branch runs, and a budget is what the recipe spends online.
    """
    recipe = resolve(name, **SMALL).override(**changes)
    if name == "paro":
        pipe, call = planted("flux", ["h", "w", "w", "h"])
    else:
        pipe, call = tiny.flux(heads=4)
        pipe.transformer.single_transformer_blocks[0].attn.norm_q.weight.data.mul_(5)  # one layer needs more or less
    calls: list[AttentionCall] = []
    with Calibration(pipe, recipe, rows=1000) as calibration:
        calibration.handle.watchers += (lambda c, plan, out: calls.append(c),)
        tiny.generate(pipe, {**call, "height": 42, "width": 34}, steps=3)
        online = errors(Planner(recipe), calls)
        choice = recipe.heads or recipe.search
        if choice is not None and choice.budget is not None:
            calibration._choice = choice.model_copy(update={"budget": online.density + 1e-4})
        profile = calibration.profile()
    return online, errors(Planner(recipe, profile), calls)


@dataclass
class Errors:
    """Mean over calls and heads of the output's squared error over its square; mean density; the masks."""

    loss: float
    density: float
    masks: list[torch.Tensor]


def errors(planner: Planner, calls: list[AttentionCall]) -> Errors:
    losses, densities, masks = [], [], []
    for call in calls:
        heads, tokens = call.q.shape[2], call.layout.length
        if planner.dense_reason(call.site, call.step, call.layout, call.q.device):
            losses.append(torch.zeros(heads))
            densities.append(1.0)
            masks.append(torch.ones(1, heads, tokens, tokens, dtype=torch.bool))
            continue
        plan = planner.plan(call)
        out = run(plan, call.q, call.k, call.v, call.scale, call.key_bias)
        bhsd = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        true = torch.nn.functional.scaled_dot_product_attention(*bhsd, scale=call.scale).transpose(1, 2)
        losses.append((out - true).square().sum((1, 3))[0] / true.square().sum((1, 3))[0])
        densities.append(float(plan.density()))
        masks.append(plan.to_mask().expand(1, heads, -1, -1))
    return Errors(float(torch.stack(losses).mean()), sum(densities) / len(densities), masks)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sparse-vdit", {}),
        ("duo", {"density": 0.5, "sinks": 0}),
        ("moa", {"density": 0.5, "sinks": 0}),
        ("sta", {**TILES, "search": "tiles", "density": 0.4}),
        ("svg2", {"p": 0.2}),
        ("paro", {"density": 0.3}),
    ],
)
def test_calibrated_errs_no_more_on_what_it_has_seen(name: str, changes: dict[str, Any]) -> None:
    """At the same cost (floors cost what they add; patterns by price cost by their price); and it is another plan."""
    if "search" in changes:
        changes = {**changes, "search": tiled(0.4)}
    online, ours = on_its_own_run(name, **changes)
    print(f"{name}: error {online.loss:.5f} to {ours.loss:.5f}, density {online.density:.3f} to {ours.density:.3f}")
    price = 0.5 if name == "sparse-vdit" else 0.0
    assert ours.loss + price * ours.density <= (online.loss + price * online.density) * 1.001
    if name not in ("svg2", "sparse-vdit"):
        assert ours.density <= online.density + 0.01
    same = all(torch.equal(a, b) for a, b in zip(online.masks, ours.masks, strict=True))
    assert same == (name == "paro")  # looks the same at every step, so that heads find the same order online


# The model is left alone --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["flux", "wan_two_experts"])
def test_the_model_runs_as_stock_and_is_given_back(family: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[family](), tiny.FAMILIES[family]()
    stock = tiny.generate(twin, call)
    with Calibration(pipe, "duo", **SMALL) as calibration:
        assert torch.equal(tiny.generate(pipe, call), stock)
        profile = calibration.profile(["a cat"])
    assert snapshot(pipe) == snapshot(twin)
    assert torch.equal(tiny.generate(pipe, call), stock)
    assert profile.made.prompts == ("a cat",)
    with dit_accel.accelerate(pipe, profile=profile, **SMALL) as handle:
        assert not torch.equal(tiny.generate(pipe, call), stock)
        assert any("profile made on" in note for note in handle.report().notes)
    assert torch.equal(tiny.generate(pipe, call), stock)
    assert snapshot(pipe) == snapshot(twin)


@pytest.mark.full
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["paro", "sta", "svg2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family(name: str, family: str, dtype: torch.dtype) -> None:
    """Each family is calibrated, in both precisions, and follows what was found, stock again afterwards."""
    pipe, call = tiny.FAMILIES[family]()
    if dtype == torch.bfloat16 and any(isinstance(value, torch.Tensor | list) for value in call.values()):
        pytest.skip("its call hands float32 embeddings over")
    pipe.to(dtype)
    stock = tiny.generate(pipe, call)
    with Calibration(pipe, name, **SMALL) as calibration:
        seen = tiny.generate(pipe, call)
        profile = calibration.profile()
    if family == "hunyuan_video":  # its padded text is left out rather than masked
        torch.testing.assert_close(seen, stock, **({"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}))
    else:
        assert torch.equal(seen, stock)
    with dit_accel.accelerate(pipe, profile=profile) as handle:
        assert torch.isfinite(tiny.generate(pipe, call)).all()
    assert handle.report().sparse_calls > 0
    assert torch.equal(tiny.generate(pipe, call), stock)


def test_two_experts_are_settled_where_they_were_seen() -> None:
    """The second expert takes over after the first of two steps; of each the other window is unknown."""
    pipe, call = tiny.wan_two_experts()
    profile = settled(pipe, call, "svg2")
    assert profile.windows == (0.0, 0.5)
    assert profile.floors is not None
    seen = {site: [heads is not None for heads in windows] for site, windows in profile.floors.items()}
    assert seen == {
        f"{expert}.blocks.{i}.attn1": [expert == "transformer", expert == "transformer_2"]
        for expert in ("transformer", "transformer_2")
        for i in range(2)
    }


def test_a_failing_pipeline_is_given_back() -> None:
    (pipe, call), (twin, _) = tiny.flux(), tiny.flux()
    with pytest.raises(TypeError):
        settled(pipe, {**call, "heigth": 34}, "duo")
    twin.set_progress_bar_config(disable=True)  # as `settled` asks of any pipeline
    assert snapshot(pipe) == snapshot(twin)


def test_a_transformer_of_ones_own_loop() -> None:
    """A bare transformer needs to be told the step; then it is calibrated like any other."""
    model = tiny.flux_transformer()
    call = {
        "hidden_states": torch.randn(1, 81, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(9), torch.arange(9)).float(),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad(), Calibration(model, "duo", block_q=16, block_k=16) as calibration:
        model(**call)
        with pytest.raises(UnsupportedError, match=r"looked at: no step known: call handle\.step"):
            calibration.profile()
        for step in range(2):
            calibration.handle.step(step, 2)
            model(**call)
        profile = calibration.profile()
    assert profile.made.layout == "8 text + 1x9x9"
    assert profile.made.steps == 2


@pytest.mark.parametrize(
    ("recipe", "asked", "message"),
    [
        ("draft", {}, "'draft': has nothing to calibrate; that needs heads, search"),
        ("xattention", {}, "a select with a number above 0"),
        ("vmoba", {}, "has cases"),
        ({"base": "svg1", "heads": {"options": [{"select": {"kind": "all"}}], "given": [0]}}, {}, "given already"),
        ("duo", {"rows": 0}, "must be at least 1"),
        ("duo", {"windows": 0}, "must be at least 1"),
        ("dou", {}, "Did you mean 'duo'?"),
    ],
)
def test_what_cannot_be_calibrated_is_said(recipe: Any, asked: dict[str, Any], message: str) -> None:
    pipe, call = tiny.flux()
    with pytest.raises(ConfigError) as error:
        calibrate(pipe, recipe, [call["prompt"]], **asked)
    assert message in str(error.value)
    assert snapshot(pipe) == snapshot(tiny.flux()[0])


def test_prompts_are_a_list_and_an_acceleration_is_not_built_upon() -> None:
    pipe, _ = tiny.flux()
    for prompts in ("a cat", []):
        with pytest.raises(ConfigError, match="expected a list of prompts"):
            calibrate(pipe, "duo", prompts)
    with dit_accel.accelerate(pipe, "draft"), pytest.raises(AlreadyAcceleratedError):
        Calibration(pipe, "duo")


def test_progress_names_each_step_of_each_run_once() -> None:
    pipe, call = tiny.wan()
    pipe.set_progress_bar_config(disable=True)
    told: list[tuple[int, int, int]] = []
    rest = {key: value for key, value in call.items() if key != "prompt"}
    calibrate(
        pipe,
        "duo",
        ["a cat", "a dog"],
        overrides={"dense_steps": 0.5},
        progress=lambda *at: told.append(at),
        num_inference_steps=2,
        **rest,
    )
    assert told == [(1, 2, 2), (2, 2, 2)]
