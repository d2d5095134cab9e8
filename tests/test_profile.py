"""Profiles as files, what they are refused for, and what the engine makes of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel
from restate import by_axes, cut, expect_groups, means, on_grid, spelled, top_p, weights
from test_restore import snapshot

import dit_accel
from dit_accel.call import AttentionCall, Site
from dit_accel.config import HeadChoice, Made, Profile, Recipe
from dit_accel.errors import ConfigError, PlanError
from dit_accel.kernels.kmeans import kmeans
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import decide
from dit_accel.sparsity import planner as planner_module
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.profiled import Profiled
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

SMALL = {"block_q": 16, "block_k": 16, "dense_steps": 0}
MADE = Made(version="0.1.0", layout="16 text + 1x17x13", steps=2, prompts=("a cat",), rows=256)
SITES = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")  # of the tiny Flux, two heads each
LAYOUT = TokenLayout(grid=(3, 6, 8), text=5)


def profile_of(name: str, *windows: Any, sites: tuple[str, ...] = SITES, **changes: Any) -> Profile:
    """A profile with the same numbers at all sites, a window each."""
    recipe = resolve(name, **{**SMALL, **changes})
    starts = tuple(i / len(windows) for i in range(len(windows)))
    what: dict[str, Any] = {"options" if recipe.heads or recipe.search else "floors": dict.fromkeys(sites, windows)}
    return Profile(made=MADE, models=("FluxTransformer2DModel",), recipe=recipe, windows=starts, **what)


# Files --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "profile",
    [
        profile_of("duo", (0, 1)),
        profile_of("sta", (3, 21), None, (0, 0)),
        profile_of("svg2", (0.1, 0.25)).model_copy(update={"clamp": (0.05, 0.2)}),
    ],
    ids=lambda profile: profile.recipe.name,
)
def test_round_trip(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path) == Profile.load(str(path)) == profile
    text = path.read_text()
    assert json.loads(text)["models"] == ["FluxTransformer2DModel"]
    assert sum(line.lstrip().startswith(f'"{SITES[0]}"') for line in text.splitlines()) == 1
    with pytest.raises(ConfigError, match="exists already"):
        profile.save(path)
    profile.save(path, force=True)
    with pytest.raises(ConfigError, match=r"a profile is a \.json file"):
        profile.save(tmp_path / "profile.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(profile_of("duo", (0, 1), (1, 1)).text())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[1]", "expected a mapping of settings, got list"),
        ('{"name": "duo"}', "is no calibration profile, it names no format"),
        (broken(lambda d: d.update(format=2, more=1)), "by dit_accel 0.1.0 in format 2; this version reads up to 1"),
        (broken(lambda d: d.update(format=0)), "format: input should be greater than or equal to 1, got 0"),
        (broken(lambda d: d.update(optoins=1)), "unknown setting 'optoins'. Did you mean 'options'?"),
        (broken(lambda d: d["made"].update(step=1)), "unknown setting 'made.step'. Did you mean 'steps'?"),
        (broken(lambda d: d["recipe"]["keeps"].update(snk=1)), "'recipe.keeps.snk'. Did you mean 'sinks'?"),
        (broken(lambda d: d.pop("models")), "models: field required"),
        (broken(lambda d: d.update(floors={})), "either options or floors"),
        (broken(lambda d: d.pop("options")), "either options or floors"),
        (broken(lambda d: d.update(windows=[0.2, 0.5])), "windows begin at 0"),
        (broken(lambda d: d.update(windows=[0.0, 0.0])), "windows begin at 0"),
        (broken(lambda d: d.update(windows=[0.0])), "attn has values for 2 windows, but there are 1"),
        (broken(lambda d: d["options"].update({SITES[0]: [[0, 1], [0]]})), "another number of heads in another window"),
        (broken(lambda d: d["options"].update({SITES[0]: [[0, 3], None]})), "names option 3, but there are 2"),
        (broken(lambda d: d["options"].update({SITES[0]: [[0, -1], None]})), "greater than or equal to 0, got -1"),
        (broken(lambda d: d["options"].update({SITES[0]: [[0, True], None]})), "should be a valid integer, got True"),
        (broken(lambda d: d["options"].update({SITES[0]: [[0, 0.5], None]})), "should be a valid integer, got 0.5"),
        (broken(lambda d: d.update(clamp=[0.1, 0.2])), "smallest and the largest of the floors"),
        (broken(lambda d: d["recipe"].update(heads=None)), "options need a recipe with heads or search"),
        (broken(lambda d: d["recipe"].update(cases=[{"layers": "0:1"}])), "has no profile"),
        (broken(lambda d: d.update(floors=d.pop("options"))), "floors need a recipe whose select has a floor"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        dit_accel.accelerate(tiny.flux()[0], profile=path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a Profile or the file of one, got dict"):
        dit_accel.accelerate(tiny.flux()[0], profile={})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        Profile.load("nowhere.json")


def test_floors_out_of_range_and_a_wrong_clamp_are_refused() -> None:
    data = json.loads(profile_of("svg2", (0.1, 0.25)).text())
    for change, message in (
        ({"floors": {SITES[0]: [[0.1, 1.5]]}}, "less than or equal to 1, got 1.5"),
        ({"clamp": [0.3, 0.1]}, "smallest and the largest"),
    ):
        from dit_accel.config import build

        with pytest.raises(ConfigError, match=message):
            build(Profile, {**data, **change}, "profile")


# What it fits -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "profile", "changes", "message"),
    [
        ("wan", profile_of("duo", (0, 1)), {}, "made for FluxTransformer2DModel, this is WanTransformer3DModel."),
        (
            "wan_two_experts",
            profile_of("duo", (0, 1)),
            {},
            "made for FluxTransformer2DModel, this is WanTransformer3DModel and WanTransformer3DModel.",
        ),
        (
            "flux",
            profile_of("duo", (0, 1), sites=(*SITES, "single_transformer_blocks.1.attn")),
            {},
            "made for a model of 3 attention sites, this one has 2 (single_transformer_blocks.1.attn is there alone).",
        ),
        (
            "flux",
            profile_of("duo", (0, 1), sites=(SITES[0], "layers.3.attention")),
            {},
            "this one has 2 (single_transformer_blocks.0.attn is here alone).",
        ),
        ("flux", profile_of("duo", (0, 1, 1)), {}, "transformer_blocks.0.attn has 3 heads in the profile, 2 here."),
        (
            "flux",
            profile_of("duo", (0, 1)),
            {"recipe": "moa"},
            "made with recipe 'duo', where heads.options is 2 long; in recipe 'moa' it is 5 long.",
        ),
        (
            "flux",
            profile_of("duo", (0, 1)),
            {"recipe": "duo", "sinks": 0},
            "made with recipe 'duo', where keeps.sinks is 16; in recipe 'duo' it is 0.",
        ),
        (
            "flux",
            profile_of("duo", (0, 1)),
            {"density": 0.3},
            "made with recipe 'duo', where heads.budget is 0.5; in recipe 'duo' it is 0.3.",
        ),
        (
            "flux",
            profile_of("svg2", (0.1, 0.1)),
            {"recipe": "svg2", "p": 0.8},
            "made with recipe 'svg2', where select.p is 0.9; in recipe 'svg2' it is 0.8.",
        ),
        (
            "flux",
            profile_of("paro", (0, 1)),
            {"recipe": "draft"},
            "where heads is set; in recipe 'draft' it is not set.",
        ),
        ("flux", profile_of("duo", (0, 1)), {"every": 0}, "every: input should be greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_differs(
    family: str, profile: Profile, changes: dict[str, Any], message: str
) -> None:
    pipe = tiny.FAMILIES[family]()[0]
    with pytest.raises(ConfigError) as error:
        dit_accel.accelerate(pipe, changes.pop("recipe", None), profile=profile, **changes)
    assert message in str(error.value)
    assert snapshot(pipe) == snapshot(tiny.FAMILIES[family]()[0])


def test_it_loads_at_other_sizes_batches_and_reuse(tmp_path: Path) -> None:
    """What is not of its axes may differ: name, dense steps and layers, reuse, blocks; so may layout and batch."""
    profile_of("duo", (0, 1)).save(tmp_path / "duo.json")
    pipe, call = tiny.flux()
    mine = {"base": "duo", "name": "mine", "every": 2, "dense_layers": 1}
    settings = {"block_q": 32, "block_k": 16, "dense_steps": 0.5}
    with dit_accel.accelerate(pipe, mine, profile=tmp_path / "duo.json", **settings) as handle:
        two = {**call, "prompt": ["a cat", "a dog"], "height": 50, "width": 18}
        assert torch.isfinite(tiny.generate(pipe, two)).all()
        report = handle.report()
    assert report.recipe == "mine"
    assert report.sparse_calls == 1
    assert report.notes[-1] == "patterns of heads by a profile made on 16 text + 1x17x13 in 2 steps"


# In the engine ------------------------------------------------------------------------------------------------------
def call(seed: int = 0, step: int = 0, site: str = SITES[0], heads: int = 2, batch: int = 1) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, LAYOUT.length, heads, 16, generator=g) for _ in range(3))
    where = Site(site, "blocks", SITES.index(site), torch.nn.Identity(), 2)
    return AttentionCall(where, StepInfo(1, step, 4, "0"), LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v)


def planned(profile: Profile, attention: AttentionCall) -> torch.Tensor:
    return Planner(profile.recipe, profile).plan(attention).check().to_mask()


def test_each_head_follows_its_number() -> None:
    """PARO by profile: each head its own order, the mask still made from the call."""
    here = call(heads=4, batch=2)
    mask = planned(profile_of("paro", (5, 0, 6, 2), density=0.4), here)
    for b in range(2):
        for h, number in enumerate((5, 0, 6, 2)):
            exact = weights(here.q[b, :, h], here.k[b, :, h])
            options = [*by_axes(LAYOUT, exact, grid_share(LAYOUT, 0.4)), torch.ones(LAYOUT.length, LAYOUT.length)]
            assert torch.equal(mask[b, h], options[number].bool())


def test_only_the_patterns_that_are_taken_are_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = decide.score
    monkeypatch.setattr(decide, "score", lambda scene, config: seen.append(scene.q.shape[2]) or original(scene, config))
    planned(profile_of("paro", (5, 0, 6, 5)), call(heads=4))
    assert sorted(seen) == [1, 2]
    seen.clear()
    Planner(resolve("paro", **SMALL)).plan(call(heads=4))
    assert seen == [4] * 6


@pytest.mark.parametrize(("name", "times"), [("sta", 1), ("svg1", 1), ("paro", 3)])
def test_patterns_of_places_are_decided_once_a_run(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though `sta` and `svg1` decide at every call without a profile; `paro` at first and at its two steps."""
    decided: list[str] = []
    original = planner_module.decide
    monkeypatch.setattr(planner_module, "decide", lambda *args: decided.append("") or original(*args))
    profile = profile_of(name, (0, 1))
    planner = Planner(profile.recipe, profile)
    masks = [planner.plan(call(7, step)).to_mask() for step in range(4)]
    assert len(decided) == times
    assert all(torch.equal(mask, masks[0]) for mask in masks[1:])


def test_patterns_of_one_order_share_one_cut() -> None:
    """Where all heads lie alike, no head needs slots of its own."""
    plan = Planner(resolve("duo", **SMALL), profile_of("duo", (0, 1))).plan(call(batch=3))
    order = plan.branches[0].q_order
    assert order is None or order.shape[:2] == (1, 1)
    assert plan.branches[0].index.shape[0] == 1


def test_a_number_for_each_head_is_needed() -> None:
    with pytest.raises(PlanError, match="options for 3 heads, but the attention has 2"):
        planned(profile_of("duo", (0, 1, 1)), call())
    with pytest.raises(PlanError, match="numbers for 3 heads, but the attention has 2"):
        planned(profile_of("svg2", (0.1, 0.2, 0.3)), call())


def test_windows_decide_anew_and_unseen_sites_follow_the_recipe() -> None:
    """The first half of the run, the second, and a window in which the site was not seen, though decisions are kept."""
    profile = profile_of("duo", (0, 1), (1, 0), None, sinks=0)
    assert profile.recipe.every > 4
    planner = Planner(profile.recipe, profile.model_copy(update={"windows": (0.0, 0.3, 0.7)}))
    raster = cut(on_grid(LAYOUT), 16)
    full = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    local = spelled(LAYOUT, raster, _band(raster, grid_share(LAYOUT, 0.1)))
    masks = [planner.plan(call(step, step)).check().to_mask() for step in range(4)]
    assert torch.equal(masks[0], torch.stack([local, full])[None])
    assert torch.equal(masks[1], masks[0])
    assert torch.equal(masks[2], torch.stack([full, local])[None])
    online = Planner(profile.recipe).plan(call(3, 3)).to_mask()
    assert torch.equal(masks[3], online)


def _band(groups: list[list[int]], share: float) -> set[tuple[int, int]]:
    from restate import band

    return band(groups, share)


@pytest.mark.parametrize("density", [None, 0.3])
def test_each_head_has_its_floor(density: float | None) -> None:
    """Top-p of clusters, but at least so many of them: a number for each head, within the clamp."""
    changes = {"queries": 3, "keys": 9, "first": 3, "p": 0.05, **({} if density is None else {"density": density})}
    profile = profile_of("svg2", (0.02, 0.45, 0.9), **changes).model_copy(update={"clamp": (0.12, 0.7)})
    here = call(heads=3)
    mask = planned(profile, here)
    grid = torch.tensor(on_grid(LAYOUT))
    for h, least in enumerate((0.12, 0.45, 0.7)):
        groups = []
        for x, count in ((here.q, 3), (here.k, 9)):
            labels = kmeans(x[0, grid, h][None, None], count, 3)[0][0, 0]
            groups.append([grid[labels == c].tolist() for c in range(count)])
        queries, keys = groups
        sizes = torch.tensor([len(group) for group in keys])
        logits = means(here.q[0, :, h], queries) @ means(here.k[0, :, h], keys).T / 4
        shares = (logits + sizes.log()).softmax(-1)
        floor = int(least * 9)
        if density is None:
            chosen = {(r, c) for r, row in enumerate(shares) for c in top_p(row, 0.05, floor)}
            expect_groups(mask[0, h], queries, keys, chosen)
        else:
            held = mask[0, h][[q[0] for q in queries]][:, [key[0] for key in keys]]
            assert (held.sum(-1) >= floor).all()


def test_floors_of_svg_ear_too() -> None:
    """The budget of a row is what top-p would take with the head's floor."""
    changes = {"queries": 3, "keys": 9, "first": 3, "p": 0.05, "correct": None}
    low, high = (
        planned(profile_of("svg-ear", floors, **changes), call()).float().mean((-1, -2))[0]
        for floors in ((0.12, 0.8), (0.8, 0.12))
    )
    assert low[0] < high[0]
    assert low[1] > high[1]


def test_a_site_whose_heads_all_compute_everything_runs_stock() -> None:
    pipe, generation = tiny.flux()
    stock = tiny.generate(pipe, generation)
    profile = profile_of("duo", (1, 2))
    with dit_accel.accelerate(pipe, profile=profile) as handle:
        assert torch.equal(tiny.generate(pipe, generation), stock)
    rows = handle.report().rows
    assert {row.reason for row in rows} == {"all heads compute everything here"}


def test_what_is_not_finite_is_computed_though_the_pattern_is_given() -> None:
    here = call()
    here.q[0, :, 0] = float("nan")
    mask = planned(profile_of("paro", (0, 0)), here)
    assert mask[0, 0].all()
    assert not mask[0, 1].all()


def test_padding_is_masked_for_each_head_alike() -> None:
    """A bias on keys that differs by head goes to the heads that take a pattern."""
    here = call(heads=3)
    bias = torch.zeros(1, 3, LAYOUT.length)
    bias[0, 2, -40:] = float("-inf")
    mask = planned(profile_of("paro", (1, 0, 1)), replace(here, key_bias=bias))
    exact = weights(here.q[0, :, 2], here.k[0, :, 2])
    exact[:, -40:] = 0
    assert torch.equal(mask[0, 2], by_axes(LAYOUT, exact / exact.sum(-1, keepdim=True), grid_share(LAYOUT, 0.3))[1])


def test_a_mapping_of_heads_by_hand_still_works() -> None:
    """`given` in a recipe is what a profile fills in; one more than the last is everything."""
    base = resolve("duo", **SMALL)
    assert base.heads is not None
    told = base.override(heads=base.heads.model_copy(update={"given": (2, 0)}).model_dump())
    assert isinstance(told.heads, HeadChoice)
    mask = Planner(told).plan(call()).to_mask()
    assert mask[0, 0].all()
    assert not mask[0, 1].all()


# What it costs ------------------------------------------------------------------------------------------------------
def big(name: str, values: tuple[float, ...], windows: int = 4) -> tuple[torch.nn.Module, Profile]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=19, num_single_layers=38)
    sites = tuple(site.name for site in dit_accel.accelerate(model, "draft", replace=True).sites)
    dit_accel.accelerate(model, "draft", replace=True).restore()
    return model, profile_of(name, *[values] * windows, sites=sites)


@pytest.mark.parametrize(("name", "values"), [("sta", tuple(range(24))), ("svg2", (0.1234,) * 24)])
def test_attaching_57_layers_with_a_profile_takes_under_50_ms(name: str, values: tuple[float, ...]) -> None:
    if name == "sta":
        values = tuple(int(value) % 23 for value in values)
    model, profile = big(name, values)
    spans = []
    for _ in range(5):
        start = time.perf_counter()
        handle = dit_accel.accelerate(model, profile=profile)
        spans.append(time.perf_counter() - start)
        assert len(handle.sites) == 57
        handle.restore()
    assert min(spans) < 0.05, spans
    assert len(profile.text()) < 64 << 10


def test_looking_up_costs_the_same_for_one_site_and_for_57() -> None:
    """The recipe in force is found by site and window, and made once."""
    _, profile = big("duo", (0, 1) * 12)
    site = Site(list(profile.values)[40], "blocks", 40, torch.nn.Identity(), 57)
    profiled = Profiled(profile.recipe, profile)
    first = profiled.at(site, 0.3)
    assert profiled.at(site, 0.49) is first
    assert profiled.at(site, 0.5) is not first
    assert first.heads is not None
    assert first.heads.given == (0, 1) * 12
    spans = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            profiled.at(site, 0.3)
        spans.append((time.perf_counter() - start) / 1000)
    assert min(spans) < 5e-6, spans


def test_a_search_is_not_carried_along_at_every_call() -> None:
    recipe: Recipe = resolve("sta", **SMALL)
    planner = Planner(recipe)
    here = planner.recipe_at(call().site, call().step)
    assert recipe.search is not None
    assert here.search is None
