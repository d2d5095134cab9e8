"""Looking into a call: what it finds, that the run stays what it was, what it says where there is nothing to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_truth
import tiny
import torch

import dit_accel
from dit_accel.acceleration import Acceleration
from dit_accel.call import AttentionCall
from dit_accel.errors import ConfigError, NotSeenError
from dit_accel.explain import Explanation
from dit_accel.sparsity import panels
from dit_accel.sparsity.draw import COMPUTED, QUERY, SKIPPED
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve

Pipeline = tuple[Any, dict[str, Any]]


def guided_pair() -> Pipeline:
    """Two samples of a picture with guidance, on a size that divides by nothing."""
    pipe, call = tiny.flux()
    call = {**call, "prompt": ["a cat", "the red taco"], "negative_prompt": ["a dog"] * 2, "true_cfg_scale": 3.0}
    return pipe, {**call, "height": 34, "width": 26}


def small(name: str, **changes: Any) -> Any:
    recipe = resolve(name, density=0.3, block_q=16, block_k=16, dense_steps=0)
    if recipe.order.kind == "tile":
        recipe = recipe.override(picture=(1, 4, 4), video=(1, 2, 3))
    if recipe.order.kind == "kmeans":
        recipe = recipe.override(queries=5, keys=14)
    return recipe.override(**changes)


def explained(
    made: Pipeline, recipe: Any, steps: int = 3, **asked: Any
) -> tuple[Explanation, torch.Tensor, list[tuple[AttentionCall, Plan, torch.Tensor]]]:
    """Run with a look at the second site, and return beside it the pictures and what a watcher saw there."""
    pipe, call = made
    seen: list[tuple[AttentionCall, Plan, torch.Tensor]] = []

    def watch(at: AttentionCall, plan: Plan, out: torch.Tensor) -> None:
        if (at.site.name, at.step.index) == (look.site.name, look.step):
            kept = {name: getattr(at, name).clone() for name in ("q", "k", "v")}
            seen.append((replace(at, **kept), plan, out.clone()))

    with dit_accel.accelerate(pipe, recipe) as handle:
        look = handle.explain(**{"site": 1, "step": 1, **asked})
        handle.watchers += (watch,)
        return look, tiny.generate(pipe, call, steps=steps), seen


@pytest.mark.parametrize(
    ("name", "make"),
    [("draft", guided_pair), ("grat-x", guided_pair), ("svg2", guided_pair), ("paro", tiny.wan), ("gna", tiny.wan),
     ("svg-ear", tiny.wan)],
)  # fmt: skip
def test_a_run_is_the_same_and_the_figures_are_those_of_its_call(name: str, make: Callable[[], Pipeline]) -> None:
    recipe = small(name)
    pipe, call = make()
    with dit_accel.accelerate(pipe, recipe):
        expected = tiny.generate(pipe, call, steps=3)
    look, made, seen = explained(make(), recipe)
    assert torch.equal(made, expected)
    assert [one.branch for one in look.calls] == [at.step.branch for at, _, _ in seen] == ["cond", "uncond"]
    for one, (at, plan, out) in zip(look.calls, seen, strict=True):
        weights = test_truth.true_weights(at)
        mask = plan.to_mask().expand_as(weights)
        recall = (weights * mask).sum((-1, -2)) / at.q.shape[1]
        torch.testing.assert_close(one.recall, recall, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.lost, 1 - recall, atol=1e-5, rtol=0)
        true = torch.einsum("bhqk,bkhd->bqhd", weights, at.v.double())
        error = (out - true).norm(dim=(1, 3)) / true.norm(dim=(1, 3))
        torch.testing.assert_close(one.error, error, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.density, mask.double().mean((-1, -2)), atol=1e-6, rtol=0)
        _check_keys(one.keys, at, mask, weights)
    page = look.draw()
    assert look.draw(heads=[0]).height < page.height
    assert str(look).count("cond") == 2 * look.calls[0].recall.numel()


def _check_keys(keys: Any, at: AttentionCall, mask: torch.Tensor, weights: torch.Tensor) -> None:
    shape = at.layout.main.shape
    assert keys.query == tuple(n // 2 for n in shape)
    start = next(start for start, segment in at.layout.spans() if segment is at.layout.main)
    token = start + int(np.ravel_multi_index(keys.query, shape))
    grid = slice(start, start + at.layout.main.length)
    assert torch.equal(keys.chosen.flatten(2).bool(), mask[:, :, token, grid])
    torch.testing.assert_close(keys.attention.flatten(2).double(), weights[:, :, token, grid], atol=1e-6, rtol=1e-4)
    assert keys.tokens == at.k.shape[1]
    assert ((keys.oracle >= 0) & (keys.oracle <= 1)).all()


def test_the_oracle_of_a_query_is_its_row_of_blocks() -> None:
    look, _, seen = explained(guided_pair(), small("svg2"), query=(0, 3, 5))
    (at, plan, _), one = seen[0], look.calls[0]
    assert one.keys is not None
    assert one.maps is not None
    start = at.layout.length - at.layout.main.length
    token = start + 3 * at.layout.main.width + 5
    for i, j in ((0, 0), (1, 1)):
        order = plan.branches[0].k_order
        assert order is not None
        rows, cols = test_truth.blocks_by_hand(plan, i, j)
        block = next(n for n, row in enumerate(rows) if token in row)
        expected = torch.zeros(at.layout.length)
        for column, tokens in enumerate(cols):
            expected[tokens] = one.maps.oracle[i, j, block, column]
        assert torch.equal(one.keys.oracle[i, j].flatten(), expected[start:])


def test_plain_data_holds_all_figures() -> None:
    look, _, _ = explained(guided_pair(), small("draft"))
    data = look.to_dict()
    assert (data["step"], data["recipe"], len(data["calls"])) == (1, "draft", 2)
    for name in ("density", "recall", "lost", "best_recall", "error"):
        assert data["calls"][1][name] == getattr(look.calls[1], name).tolist()


# -- calls that ran dense ---
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dense_steps": 0.7}, "first 2 of 3 steps stay dense"),
        ({"dense_layers": 2}, "first 2 layers stay dense"),
        ({"cases": ({"layers": "1:2", "select": {"kind": "all"}},)}, "the recipe computes every pair here"),
        ({"density": 1.0}, "density 1 is dense"),
        ({"correct": {"kind": "residual", "every": 2}}, "a full step measures what is missing"),
    ],
)
def test_a_call_that_ran_dense_says_why(changes: dict[str, Any], reason: str) -> None:
    look, _, _ = explained(guided_pair(), small("draft", **changes), step=0)
    assert [(one.branch, one.reason) for one in look.calls] == [("cond", reason), ("uncond", reason)]
    assert f"branch uncond: nothing was chosen ({reason})" in str(look)
    assert look.to_dict()["calls"][0]["reason"] == reason
    with pytest.raises(NotSeenError, match="there is nothing to draw"):
        look.draw()
    with pytest.raises(NotSeenError, match=reason):
        _ = look.calls[0].recall


def test_an_operator_has_no_pairs_to_show() -> None:
    look, _, _ = explained(guided_pair(), small("agent", keeps={"own": False}))
    assert {one.reason for one in look.calls} == {"agent attention is an operator, which computes no pairs"}


# -- when it watches ---
def attached(recipe: Any = None) -> tuple[Pipeline, Acceleration]:
    pipe, call = tiny.flux()
    return (pipe, call), dit_accel.accelerate(pipe, recipe or small("draft"))


def test_it_holds_one_run_and_then_watches_no_more() -> None:
    (pipe, call), handle = attached()
    look = handle.explain(1, 1)
    tiny.generate(pipe, call, steps=1)  # never gets there
    with pytest.raises(NotSeenError, match="the last call seen was at step 0 of 1"):
        _ = look.calls
    tiny.generate(pipe, call, steps=2, seed=1)
    first = look.calls
    tiny.generate(pipe, call, steps=2, seed=2)
    assert look.calls == first
    assert handle.watchers == ()
    assert handle._engine.ledger.listeners == ()


def test_a_block_ends_the_watch_and_two_looks_share_nothing() -> None:
    (pipe, call), handle = attached()
    with handle.explain(0, 0) as one, handle.explain("transformer_blocks.0.attn", 1) as other:
        tiny.generate(pipe, call, steps=2)
    assert handle.watchers == ()
    assert one.site is other.site
    assert not torch.equal(one.calls[0].recall, other.calls[0].recall)


def test_numbers_of_numpy_and_lists_are_numbers() -> None:
    (pipe, call), handle = attached()
    look = handle.explain(np.int64(1), np.int32(1), [0, np.int64(1), 2])  # pyright: ignore[reportArgumentType]
    tiny.generate(pipe, call, steps=2)
    assert look.calls[0].keys is not None
    assert look.calls[0].keys.query == (0, 1, 2)


def test_a_look_that_fails_stops_one_run_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    (pipe, call), handle = attached()
    expected = tiny.generate(pipe, call, steps=2)
    handle.explain(0, 1)

    def fail(*_: Any) -> None:
        raise MemoryError("no room to look")

    monkeypatch.setattr("dit_accel.explain.measure", fail)
    with pytest.raises(MemoryError, match="no room"):
        tiny.generate(pipe, call, steps=2)
    assert torch.equal(tiny.generate(pipe, call, steps=2), expected)
    assert handle.watchers == handle._engine.ledger.listeners == ()


def test_what_is_asked_too_early_is_said() -> None:
    _, handle = attached()
    with pytest.raises(NotSeenError, match="nothing has: run the pipeline first"):
        str(handle.explain(0, 0))


def test_a_loop_without_steps_says_how_to_name_them() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe.transformer, small("draft")) as handle:
        look = handle.explain(0, 0)
        tiny.generate(pipe, call)
        with pytest.raises(NotSeenError, match=r"call handle\.step"):
            _ = look.calls


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"site": 2}, "site must lie in 0..1, got 2"),
        ({"site": "transformer_block.0.attn"}, "Did you mean 'transformer_blocks.0.attn'?"),
        ({"site": 1.0}, "site: expected a whole number, got 1.0"),
        ({"step": -1}, "step counts from 0, got -1"),
        ({"step": "1"}, "step: expected a whole number, got '1'"),
        ({"query": (0, 1)}, "query: expected (frame, row, column) as three whole numbers, got (0, 1)"),
        ({"query": (0, 1, 2, 3)}, "as three whole numbers, got (0, 1, 2, 3)"),
        ({"query": (0, 1, 1.5)}, "as three whole numbers, got (0, 1, 1.5)"),
        ({"query": 5}, "as three whole numbers, got 5"),
    ],
)
def test_what_is_not_there_is_named(asked: dict[str, Any], said: str) -> None:
    _, handle = attached()
    with pytest.raises(ConfigError) as error:
        handle.explain(**{"site": 0, "step": 0, **asked})
    assert said in str(error.value)
    assert handle.watchers == ()
    handle.restore()
    with pytest.raises(ConfigError, match="was restored"):
        handle.explain(0, 0)


def test_a_query_or_head_that_is_not_there_is_named_when_drawn() -> None:
    look, _, _ = explained(guided_pair(), small("draft"), query=(0, 17, 0))
    assert look.calls[0].keys is None
    with pytest.raises(ConfigError, match=r"query \(0, 17, 0\) lies outside the grid of 1x17x13 tokens"):
        look.draw()
    look, _, _ = explained(guided_pair(), small("draft"))
    for wrong in ({"sample": 2}, {"heads": [2]}, {"heads": [-1]}):
        with pytest.raises(ConfigError, match="2 samples and 2 heads, counted from 0"):
            look.draw(**wrong)


# -- pixels ---
def test_colours_and_panels() -> None:
    assert panels.share_colours(np.array([0.0, 1.0], np.float32)).tolist() == [list(SKIPPED), list(COMPUTED)]
    even = panels.mass_colours(np.array([0, 1 / 16, 1, 16, 1e9], np.float32)).tolist()
    assert even[0] == even[1] == list(panels._HEAT[0])
    assert even[2] == list(panels._HEAT[2])
    assert even[3] == even[4] == list(panels._HEAT[-1])
    blocks = panels.block_map(panels.share_colours(np.array([[0, 1], [1, 0]], np.float32)))
    assert blocks.size == (panels.PANEL, panels.PANEL)
    assert [blocks.getpixel(at) for at in ((0, 0), (159, 0), (0, 159), (159, 159))] == [
        SKIPPED,
        COMPUTED,
        COMPUTED,
        SKIPPED,
    ]
    frames = panels.share_colours(np.zeros((5, 4, 6), np.float32))
    clip = np.asarray(panels.grid_map(frames, (4, 3, 5)))
    scale = panels.PANEL // 12  # two frames of six beside each other
    red = np.argwhere((clip == QUERY).all(-1))
    assert red.min(0).tolist() == [2 * 5 * scale + 3 * scale, 5 * scale]  # the fifth frame begins the third row
    assert len(red) == scale**2


def test_a_page_is_as_wide_as_its_widest_row() -> None:
    panel = panels.block_map(np.zeros((3, 3, 3), np.uint8))
    one, two = panels.page([("a", [panel])]), panels.page([("a", [panel]), ("b", [panel] * 2)])
    assert two.width == one.width + panels.PANEL + panels.GAP
    assert two.height == one.height + panels.LINE + panels.PANEL + panels.GAP
    assert two.getpixel((panels.GAP, panels.GAP // 2 + panels.LINE)) == (0, 0, 0)
    assert two.getpixel((two.width - 1, two.height - 1)) == panels.GROUND


@pytest.mark.full
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_can_be_looked_into(family: str) -> None:
    """References, padding, sequences without text, two experts: the same run, and figures or a reason for each call."""
    pipe, call = tiny.FAMILIES[family]()
    with dit_accel.accelerate(pipe, small("draft")):
        expected = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, small("draft")) as handle:
        looks = [handle.explain(site.name, 1) for site in handle.sites]
        made = tiny.generate(pipe, call)
    assert torch.equal(made, expected)
    seen = [one for look in looks if look._calls for one in look.calls]
    assert any(one.maps is not None for one in seen)
    for one in seen:
        assert one.reason or bool(((one.recall > 0) & (one.recall <= one.best_recall + 1e-6)).all())
