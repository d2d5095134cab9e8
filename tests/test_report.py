"""The report counts what ran, in numbers, words, terminal tables and HTML."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.report import ranges

OPTIONS = {"picture": (1, 4, 4), "block_q": 16, "block_k": 16}


def test_figures_add_up() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", density=0.4, dense_steps=0.5, **OPTIONS) as handle:
        tiny.generate(pipe, call, steps=4)
        report = handle.report()
    assert (report.calls, report.sparse_calls, report.steps) == (8, 4, 4)
    assert report.density == pytest.approx(0.4, rel=0.2)
    assert report.overall_density == pytest.approx((1 + report.density) / 2)
    assert {(row.steps, row.kind) for row in report.rows} == {("0-1", "dense"), ("2-3", "sparse")}
    assert {row.group for row in report.rows} == {"transformer_blocks", "single_transformer_blocks"}
    assert next(row.reason for row in report.rows if row.kind == "dense") == "first 2 of 4 steps stay dense"
    assert report.attention_share is None


def test_report_covers_the_last_run_only() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", **OPTIONS) as handle:
        tiny.generate(pipe, call, steps=5)
        tiny.generate(pipe, call, steps=3)
        assert handle.report().steps == 3


def test_report_can_be_read_anywhere() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", density=0.1, **OPTIONS) as handle:
        tiny.generate(pipe, call, max_sequence_length=64)
        report = handle.report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["density"] == report.density
    for text in (str(report), report._repr_html_()):
        assert "draft" in text
        assert "single_transformer_blocks" in text
        assert "use a shorter text length" in text


def test_report_before_any_run() -> None:
    pipe, _ = tiny.flux()
    with dit_accel.accelerate(pipe, "draft") as handle:
        report = handle.report()
    assert (report.calls, report.density, report.overall_density) == (0, 1.0, 1.0)
    assert str(report)


def test_preset_goes_dense_where_sparse_is_slower_and_says_so() -> None:
    pipe, call = tiny.flux()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, "fast", dense_steps=0) as handle:
        assert torch.equal(tiny.generate(pipe, call), stock)
        report = handle.report()
    assert report.sparse_calls == 0
    assert "237 tokens: dense is faster on cpu (measured" in report.rows[0].reason


def test_explicit_recipe_is_carried_out_where_a_preset_would_not() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, "draft", dense_steps=0, **OPTIONS) as handle:
        tiny.generate(pipe, call)
    assert handle.report().sparse_calls == handle.report().calls


def test_stages_run_before_the_plan() -> None:
    """The place where completed keys and editing controls attach: edits are seen by plan and kernel."""
    pipe, call = tiny.flux()
    plain_options = {"density": 0.5, "dense_steps": 0, **OPTIONS}

    def silence(attention: AttentionCall) -> AttentionCall:
        return replace(attention, v=torch.zeros_like(attention.v))

    def rotate_again(attention: AttentionCall) -> AttentionCall:
        assert attention.rotate is not None
        assert attention.q_raw is not None
        return replace(attention, q=attention.rotate(attention.q_raw))

    with dit_accel.accelerate(pipe, "draft", **plain_options) as handle:
        plain = tiny.generate(pipe, call)
        handle.stages = (rotate_again,)
        assert torch.equal(tiny.generate(pipe, call), plain)
        handle.stages = (rotate_again, silence)
        silent = tiny.generate(pipe, call)
    assert not torch.equal(plain, silent)


def test_own_loop_without_a_pipeline() -> None:
    model = tiny.flux_transformer().eval()
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(12), torch.arange(12)).float()
    call = {
        "hidden_states": torch.randn(1, 144, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad(), dit_accel.accelerate(model, "draft", density=0.5, **OPTIONS) as handle:
        model(**call)
        assert "call handle.step(index, total)" in handle.report().rows[0].reason
        for index in range(5):
            handle.step(index, 5, "cond")
            model(**call)
            handle.step(index, 5, "uncond")
            model(**call)
        report = handle.report()
        assert (report.calls, report.sparse_calls, report.steps) == (20, 16, 5)
        with pytest.raises(ValueError, match=r"index must lie in 0\.\.4, got 5"):
            handle.step(5, 5)


def test_step_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == "?"
