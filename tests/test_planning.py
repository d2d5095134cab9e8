"""A plan before the run: its counts against torch's own on real tensors, what it says against what the engine does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel.config import TileOrder
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.hosts import family_of
from dit_accel.layout import Grid, TokenLayout
from dit_accel.planning import rates, target, times
from dit_accel.planning.inputs import INPUTS, Cells
from dit_accel.planning.models import META, twin
from dit_accel.planning.nearby import better, fit
from dit_accel.planning.work import count
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.recipes import resolve

CPU = torch.device("cpu")
STEPS = 5


def transformer(make: Callable[[], tuple[Any, Any]]) -> Any:
    return make()[0].transformer


# name: a tiny model, cells of its latents, text tokens
TINY: dict[str, tuple[Callable[[], tuple[Any, Any]], Cells, int]] = {
    "flux": (tiny.flux, (1, 17, 13), 16),
    "wan": (tiny.wan, (3, 20, 12), 16),
    "wan-image": (tiny.wan_image, (3, 20, 12), 512),
    "hunyuan": (tiny.hunyuan_video, (3, 22, 14), 16),
    "cogvideox": (tiny.cogvideox, (3, 20, 12), 16),
    "cogvideox-rotary": (tiny.cogvideox_rotary, (3, 20, 12), 16),
    "qwen": (tiny.qwen_image, (1, 13, 9), 8),
    "ltx": (tiny.ltx, (3, 9, 7), 16),
    "sd3": (tiny.sd3, (1, 13, 11), 20),
}


def arguments(model: Any, cells: Cells, text: int) -> dict[str, Any]:
    family = family_of(model)
    assert family is not None
    torch.manual_seed(0)
    return INPUTS[family.name].make(model.config, cells, text, CPU, torch.float32)


def on_meta(value: Any) -> Any:
    return (
        value.to(META)
        if isinstance(value, torch.Tensor)
        else tuple(map(on_meta, value))
        if isinstance(value, tuple)
        else value
    )


def planned(model: Any, cells: Cells, text: int, **settings: Any) -> dit_accel.RunPlan:
    family = family_of(model)
    assert family is not None
    inputs = INPUTS[family.name]
    pixels = inputs.space * inputs.packed
    frames = {} if inputs.time is None else {"frames": (cells[0] - 1) * inputs.time + 1}
    size = {"height": cells[1] * pixels, "width": cells[2] * pixels, **frames}
    return dit_accel.plan(model, **size, text_length=text, steps=STEPS, device="cpu", **settings)


# -- counting ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_torch_counts_on_real_tensors(name: str) -> None:
    make, cells, text = TINY[name]
    model = transformer(make).eval()
    given, family = arguments(model, cells, text), family_of(model)
    assert family is not None
    with FlopCounterMode(display=False) as real, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**given, return_dict=False)
    made = twin(model)
    work = count(made, {key: on_meta(value) for key, value in given.items()}, family.find_sites(made))
    assert work.matmul + work.pairs == real.get_total_flops()
    assert work.pairs > 0


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False, device=META)

    def forward(self, x: torch.Tensor, return_dict: bool) -> torch.Tensor:
        y = self.linear(x)  # 2 * 4 * 8 * 8 FLOPs, no traffic counted
        z = y + y  # two reads, one write
        del y
        z = z * torch.ones(1, 1, device=META).expand(4, 8)  # the one value is read once
        a, _ = z.unflatten(-1, (-1, 2)).unbind(-1)  # every second of 8 channels
        return a.neg()  # reads what lies between, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_traffic_and_the_most_memory_by_hand(dtype: torch.dtype) -> None:
    model, size = Steps().to(dtype), dtype.itemsize
    with torch.no_grad():
        work = count(model, {"x": torch.empty(4, 8, dtype=dtype, device=META)}, [])
    wide = 4 * 8
    ones, multiplied = 4, 4 * wide  # torch.ones is float32, and so is what it meets
    assert work.matmul == 2 * 4 * 8 * 8
    assert work.traffic == 3 * wide * size + ones + (wide * size + ones + multiplied) + (4 * wide + 4 * wide // 2)
    assert work.peak == max(3 * wide * size, 2 * wide * size + ones + multiplied)


# -- the plan against the engine --------------------------------------------------------------------------------------
def run(model: Any, cells: Cells, text: int, recipe: Any) -> dit_accel.Report:
    given = arguments(model, cells, text)
    with dit_accel.accelerate(model, recipe) as handle, torch.no_grad():
        for index in range(STEPS):
            handle.step(index, STEPS)
            model(**given, return_dict=False)
        return handle.report()


def called(row: Any) -> int:
    """Calls of a plan's row over all its steps."""
    ends = [part.split("-") for part in row.steps.split(", ")]
    return row.sites * sum(int(part[-1]) - int(part[0]) + 1 for part in ends)


def merged(rows: Any) -> dict[tuple[str, ...], tuple[int, float]]:
    """Calls and density by group, steps, kind and reason; the engine's report does not tell sequences apart."""
    found: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    for *key, calls, density, tokens in rows:
        found.setdefault(tuple(key), []).append((calls, density, calls * float(tokens) ** 2))
    return {
        key: (sum(c for c, _, _ in parts), sum(d * w for _, d, w in parts) / sum(w for _, _, w in parts))
        for key, parts in found.items()
    }


RECIPES = {
    "budget": {"recipe": "draft", "density": 0.5},
    "places": {"recipe": "radial", "dense_layers": 1},
    "preset": {"recipe": "quality"},
    "not calibrated": {"recipe": "sta"},
    "kept": {"recipe": "fast", "density": 0.4},
    "full steps between": {"recipe": "rettention", "every": 2},
    "by layer": {
        "recipe": {"base": "draft", "name": "x", "density": 0.5, "cases": [{"layers": "1:", "select": {"kind": "all"}}]}
    },
}


EACH = [(name, kind) for name in TINY for kind in RECIPES if kind == "budget" or name in ("wan", "hunyuan", "sd3")]


@pytest.mark.parametrize(("name", "kind"), EACH)
def test_the_plan_says_what_the_engine_then_does(name: str, kind: str) -> None:
    make, cells, text = TINY[name]
    model = transformer(make).eval()
    recipe = resolve(**RECIPES[kind])
    plan, report = planned(model, cells, text, recipe=recipe), run(model, cells, text, recipe)

    exact = not recipe.content_driven
    said = merged((r.group, r.steps, r.kind, r.reason, called(r), r.density or 0.0, r.tokens or 1) for r in plan.rows)
    did = merged((r.group, r.steps, r.kind, r.reason, r.calls, r.density, 1) for r in report.rows)
    assert {key: calls for key, (calls, _) in said.items()} == {key: calls for key, (calls, _) in did.items()}
    rough = 0.5 if any("roughly" in note for note in plan.notes) else 0.2
    for key, (_, density) in did.items():
        assert said[key][1] == pytest.approx(density, rel=1e-6 if exact else rough), key
    assert plan.density == pytest.approx(report.overall_density, rel=1e-6 if exact else rough)
    assert plan.layout == report.layout
    assert set(plan.notes) >= {note for note in report.notes if note.startswith(("asked", "not calibrated"))}
    assert any("not calibrated" in note for note in report.notes) == (kind == "not calibrated")
    assert plan.untouched == report.untouched
    assert report.state_bytes <= plan.memory.state + plan.memory.text


def test_nothing_of_the_model_is_touched_and_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = tiny.wan()
    model = pipe.transformer
    before = {name: site.processor for name, site in model.named_modules() if hasattr(site, "processor")}
    version = [(p.data_ptr(), p._version) for p in model.parameters()]
    dit_accel.plan(pipe, height=80, width=48, frames=9, recipe="draft", density=0.5, steps=3)
    assert {name: site.processor for name, site in model.named_modules() if hasattr(site, "processor")} == before
    assert version == [(p.data_ptr(), p._version) for p in model.parameters()]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert {p.device for p in twin(model).parameters()} == {META}


def test_a_site_that_cannot_be_accelerated_is_untouched_with_its_reason() -> None:
    model = transformer(tiny.flux)

    class Weighted(nn.Module):
        def __init__(self, original: Any) -> None:
            super().__init__()
            self.original = original

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.original(*args, **kwargs)

    site = model.transformer_blocks[0].attn
    site.processor = Weighted(site.processor)
    plan = planned(model, (1, 17, 13), 16, recipe="draft", density=0.5)
    assert list(plan.untouched) == ["transformer_blocks.0.attn"]
    assert {row.group for row in plan.rows} == {"single_transformer_blocks"}


def test_of_several_transformers_the_first_is_planned_and_all_are_weighed() -> None:
    pipe, _ = tiny.wan_two_experts()
    both = dit_accel.plan(pipe, height=80, width=48, frames=9, recipe="draft", density=0.5, device="cpu")
    one = dit_accel.plan(pipe.transformer, height=160, width=96, frames=9, recipe="draft", density=0.5, device="cpu")
    assert both.memory.weights == 2 * one.memory.weights
    assert any("the first is planned" in note for note in both.notes)
    assert not any("the first is planned" in note for note in one.notes)


def test_a_rule_by_mass_has_no_density_before_the_run() -> None:
    plan = planned(transformer(tiny.wan), (3, 20, 12), 16, recipe="xattention", dense_steps=0)
    assert [(row.kind, row.asked, row.density) for row in plan.rows] == [("sparse", None, None)]
    assert plan.density is None
    assert "follows from the attention" in str(plan)


# -- times ------------------------------------------------------------------------------------------------------------
RATES = {"flop": 2e-12, "byte": 4e-7, "pair": 3e-12, "start": 2e-6, "unit": 9e-8, "read": 1e-10, "dense": 5e11}


def made_case(index: int, pooled: int = 0) -> rates.Case:
    """Make a case that took exactly what the rates say, with `pooled` mean keys for each unit."""
    tokens, heads, sites, r = 30_000 * index + 1000, 8 * index, 10 + index, RATES
    slots, units, matmul, traffic = tokens + 300 * index, tokens // 128 + 1, 1e14 * index**2, 3e11 * index
    flops = 4.0 * heads * tokens**2 * 128
    rest, dense = matmul * r["flop"] + traffic * r["byte"], flops / r["dense"]

    def point(density: float) -> rates.Point:
        pairs = density * slots + pooled * units
        kernel = 4 * pairs * heads * slots * 128 * r["pair"] + heads * slots * r["start"]
        decision = heads * units**2 * r["unit"] + heads * slots * 128 * r["read"]
        return rates.Point(density, rest + sites * (kernel + decision), kernel, decision, decision / 4)

    return rates.Case(
        case=f"case {index}", matmul=matmul, traffic=traffic, our_matmul=matmul, our_traffic=traffic, flops=flops,
        sites=sites, tokens=tokens, heads=heads, dim=128, masked=False, slots=slots, units=units, whole=False,
        stock_ms=rest + sites * dense, attention_ms=sites * dense, sdpa_ms=dense, points=(point(0.5), point(0.2)),
        pooled=pooled * units,
    )  # fmt: skip


@pytest.mark.parametrize("pooled", [0, 2])
def test_rates_are_found_again_and_a_case_is_never_judged_by_itself(pooled: int) -> None:
    cases = [made_case(i, pooled) for i in (1, 2, 3, 4)]
    judged = rates.leave_one_out(cases)
    assert len(judged) == 4 * 3
    assert rates.mean_error(judged) < 1e-6
    odd = replace(cases[1], stock_ms=cases[1].stock_ms * 1.5, points=())
    again = {(j.case, j.density): j for j in rates.leave_one_out([cases[0], odd, *cases[2:]])}
    theirs = again["case 2", None]
    assert theirs.modelled_ms == pytest.approx(cases[1].stock_ms)
    assert theirs.error == pytest.approx(1 / 1.5 - 1)
    assert abs(again["case 1", None].error) > 0.01  # the others were judged with it


def test_what_one_case_alone_shows_is_judged_by_the_other_kind() -> None:
    cases = [made_case(i) for i in (1, 2, 3)]
    masked = replace(cases[2], masked=True, attention_ms=cases[2].attention_ms * 2)
    fitted = rates.Rates.fit([*cases[:2], masked])
    assert fitted.dense_ms(masked.flops, masked.tokens, True) == pytest.approx(2 * cases[2].sdpa_ms)
    assert fitted.dense_ms(masked.flops, masked.tokens, False) == pytest.approx(cases[2].sdpa_ms)
    alone = rates.Rates.fit(cases[:2])
    assert alone.dense_ms(masked.flops, masked.tokens, True) == pytest.approx(cases[2].sdpa_ms)
    assert alone.kernel[True] == alone.kernel[False]


def test_costs_are_never_negative() -> None:
    """More of the first work took less time: it costs nothing, and the second alone explains the rows best."""
    assert rates.costs([(1.0, 1.0), (2.0, 1.0), (4.0, 1.0)], [1.0, 0.9, 0.8])[0] == 0
    assert rates.costs([(1.0, 1.0), (1.0, 2.0), (1.0, 4.0)], [1.0, 0.9, 0.8])[1] == 0
    assert rates.costs([(1.0, 9.0), (2.0, 1.0), (4.0, 20.0)], [19.0, 4.0, 44.0]) == pytest.approx((1.0, 2.0))


@pytest.fixture(scope="module", params=rates.devices())
def gpu(request: pytest.FixtureRequest) -> str:
    """Every GPU of the committed table."""
    return request.param


@pytest.fixture(scope="module")
def small(gpu: str) -> dit_accel.RunPlan:
    """The smallest measured case, as it was measured: sparse and decided anew in every step."""
    device = rates.devices()[gpu]
    then, size = {"base": device.recipe, "every": 1, **device.settings}, {"height": 480, "width": 832, "frames": 81}
    return dit_accel.plan("wan-1.3b", **size, recipe=then, density=0.2, dense_steps=0, steps=4, device=gpu)


def test_the_committed_table_gives_times_near_those_measured(small: dit_accel.RunPlan, gpu: str) -> None:
    device = rates.devices()[gpu]
    case = next(case for case in device.cases if case.case == "wan-1.3b-480p-81")
    point = min(case.points, key=lambda point: abs(point.density - 0.2))
    assert small.times is not None
    assert small.times.stock_ms == pytest.approx(case.stock_ms, rel=0.1)
    assert small.times.sparse_ms == small.times.mean_ms == pytest.approx(point.step_ms, rel=0.1)
    assert small.times.speedup == pytest.approx(small.times.stock_ms / point.step_ms, rel=0.1)
    assert small.times.measured_on["gpu"] == device.gpu
    (row,) = small.rows
    assert (row.tokens, row.heads, row.dim, row.sites, row.steps, row.share) == (32_760, 12, 128, 30, "0-3", 1.0)
    judged = rates.leave_one_out(device.cases)
    assert small.times.stock_error == rates.mean_error(j for j in judged if j.density is None)
    assert small.times.accelerated_error == rates.mean_error(j for j in judged if j.density is not None)


def test_the_plan_is_plain_data_and_readable(small: dit_accel.RunPlan) -> None:
    data = json.loads(json.dumps(small.to_dict(), allow_nan=False))
    assert data["times"]["speedup"] == small.times.speedup if small.times else False
    assert data["memory"]["total"] == sum(data["memory"][key] for key in ("weights", "activations", "state", "text"))
    text = str(small)
    for part in ("wan-1.3b, 832x480, 81 frames", "32760", "0.200", "mean error", "GiB weights"):
        assert part in text


def test_the_docs_quote_the_committed_error(gpu: str) -> None:
    error = times.Clock(rates.devices()[gpu]).error
    text = (Path(__file__).parent.parent / "docs" / "plan.md").read_text()
    assert f"{error.stock:.1%}" in text
    assert f"{error.accelerated:.1%}" in text


def made_device(monkeypatch: pytest.MonkeyPatch, tokens: int, recipe: str = "balanced") -> None:
    """Put a device "made" into the table, measured with a recipe at about so many tokens and heads of 12 channels."""
    cases = tuple(replace(made_case(i), tokens=tokens + i, dim=12) for i in (1, 2, 3))
    device = replace(next(iter(rates.devices().values())), cases=cases, recipe=recipe, settings={})
    monkeypatch.setattr("dit_accel.planning.target.devices", lambda: {"made": device})


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"recipe": "rectified", "density": 0.3}, "'rectified': a correction was not timed"),
        ({"recipe": "svg1"}, "heads that choose"),
        ({"recipe": "draft", "precision": "int8"}, "precision int8"),
        ({"recipe": "xattention"}, "follows from the attention"),
    ],
)
def test_what_was_not_timed_has_no_accelerated_time(
    settings: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_device(monkeypatch, 180)
    model, size = transformer(tiny.wan).to(META), {"height": 160, "width": 96, "frames": 9}
    plan = dit_accel.plan(model, **size, steps=5, text_length=16, device="made", **settings)
    assert plan.times is not None
    assert plan.times.stock_ms > 0
    assert plan.times.mean_ms is None
    assert why in plan.times.untimed


def test_the_mean_keys_of_a_correction_that_was_timed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made_device(monkeypatch, 180, "hilbert-ear")
    model, size = transformer(tiny.wan).to(META), {"height": 160, "width": 96, "frames": 9}

    def sparse_ms(**settings: Any) -> float:
        plan = dit_accel.plan(
            model, **size, steps=5, text_length=16, device="made", recipe="hilbert-ear", density=0.3, **settings
        )
        assert plan.times is not None
        assert plan.times.sparse_ms is not None
        return plan.times.sparse_ms

    assert sparse_ms(key_run=16, block_q=64, block_k=64) > sparse_ms(key_run=0, block_q=64, block_k=64)


def test_no_times_where_nothing_alike_was_measured() -> None:
    nowhere = planned(transformer(tiny.wan), (3, 20, 12), 16)
    assert nowhere.times is None
    assert "no step was measured on cpu" in nowhere.untimed
    short = dit_accel.plan(transformer(tiny.wan).to(META), height=160, width=96, frames=9, device="h200")
    assert short.times is None
    assert "180 tokens: steps were measured from" in short.untimed


def test_planned_where_todays_presets_were_measured() -> None:
    first = target.target(None, None)
    assert first.measured is not None
    assert not first.measured.settings
    for device in rates.devices():
        plan = dit_accel.plan("wan-1.3b", height=480, width=832, frames=81, recipe="balanced", device=device)
        assert plan.times is not None
        assert plan.times.sparse_ms is not None
        assert plan.times.sparse_ms < plan.times.stock_ms


# -- sizes nearby -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["draft", "grat-x", "minference"])
@pytest.mark.parametrize("shape", [(1, 45, 80), (21, 30, 52), (5, 33, 47), (1, 64, 64)])
def test_fit_counts_the_slots_of_the_real_tiling(shape: tuple[int, int, int], name: str) -> None:
    recipe = resolve(name)
    assert isinstance(recipe.order, TileOrder)
    here = fit(shape, recipe.order)
    tiling = tiling_for(recipe, TokenLayout(grid=shape))
    if tiling.unit == math.prod(here.tile):  # else blocks round the tile up as well
        assert here.slots == len(tiling.slots)
    for other in better(Grid(*shape), recipe):
        assert other.padding < here.padding
        assert other.slots < here.slots


def test_sizes_nearby_are_accepted_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    made_device(monkeypatch, 2400)
    model = tiny.wan_transformer(attention_head_dim=12, rope_max_seq_len=64).to(META)
    settings = {"recipe": "draft", "density": 0.3, "packed": False, "steps": 2, "device": "made"}
    plan = dit_accel.plan(model, height=22 * 16, width=36 * 16, frames=9, **settings)
    assert plan.times is not None
    assert plan.times.mean_ms is not None
    assert plan.faster
    assert "slots a token in tiles of" in str(plan)
    for size in plan.faster:
        there = dit_accel.plan(model, height=size.height, width=size.width, frames=size.frames, **settings)
        assert there.times is not None
        assert there.times.mean_ms == size.mean_ms
        assert size.mean_ms is not None
        assert size.mean_ms < plan.times.mean_ms
        assert size.padding < 24 * 48 / (22 * 36)
        assert abs(size.tokens / (3 * 22 * 36) - 1) < 0.2


# -- at the door ------------------------------------------------------------------------------------------------------
SIZE = {"height": 480, "width": 832, "frames": 81}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("wan-14B", {}, "no model is called 'wan-14B'. Did you mean 'wan-14b'"),
        ("wan-1.3b", {"height": 481}, "height: wan-1.3b needs a multiple of 16, got 481; the nearest is 480 or 496"),
        ("wan-1.3b", {"width": 0}, "width: expected a whole number of at least 1, got 0"),
        ("wan-1.3b", {"frames": 80}, "got 80; the nearest is 77 or 81"),
        ("wan-1.3b", {"frames": None}, "frames: wan-1.3b makes clips"),
        ("wan-1.3b", {"steps": 2.5}, "steps: expected a whole number"),
        ("wan-1.3b", {"text_length": 0}, "text_length: expected a whole number"),
        ("wan-1.3b", {"device": "h300"}, "device: none that was measured is called 'h300'"),
        ("wan-1.3b", {"recipe": "drafd"}, "Did you mean 'draft'"),
        ("wan-1.3b", {"density": 0}, "density"),
        ("flux", {}, "frames: flux makes pictures"),
    ],
)
def test_errors_at_the_door(model: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        dit_accel.plan(model, **{**SIZE, **changes})


def test_a_size_that_the_model_itself_cannot_run_is_one_clear_error() -> None:
    model = tiny.wan_transformer(rope_max_seq_len=32)
    with pytest.raises(ConfigError, match="WanTransformer3DModel itself does not run at this size"):
        dit_accel.plan(model, height=160, width=33 * 16, frames=9)


def test_a_model_whose_inputs_are_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="PixArtTransformer2DModel: what its forward is given is not known"):
        dit_accel.plan(tiny.pixart()[0], height=64, width=64)
