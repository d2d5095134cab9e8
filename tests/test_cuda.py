"""The engine on a CUDA device: our kernel inside whole pipelines, GPU times in the report, nothing left behind."""

from __future__ import annotations

import pytest
import test_hosts
import tiny
import torch

import dit_accel
from dit_accel.errors import NonFiniteError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


VIDEO = ["wan_two_experts", "wan_per_token_time", "wan_image", "hunyuan_video", "cogvideox_rotary"]


def on_gpu(value: object, dtype: torch.dtype) -> object:
    """Tensors, also in lists, to the device; floating ones in `dtype`."""
    if isinstance(value, list):
        return [on_gpu(item, dtype) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", dtype if value.is_floating_point() else None)


@pytest.mark.parametrize("name", ["flux", "kontext", "qwen_image", "z_image", "ltx", *VIDEO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_on_every_pair_is_stock_within_rounding(name: str, dtype: torch.dtype) -> None:
    pipe, call = tiny.FAMILIES[name]()
    pipe.to("cuda", dtype)
    call = {k: on_gpu(v, dtype) for k, v in call.items()}
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, test_hosts.FULL) as handle:
        ours = tiny.generate(pipe, call)
    report = handle.report()
    assert report.sparse_calls == report.calls
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    assert float((ours.float() - stock.float()).norm() / stock.float().norm()) < limit
    assert torch.equal(tiny.generate(pipe, call), stock)


def test_report_names_the_kernel_and_times_attention() -> None:
    pipe, call = tiny.flux()
    pipe.to("cuda", torch.bfloat16)
    with dit_accel.accelerate(pipe, test_hosts.SPARSE, dense_steps=0.5) as handle:
        tiny.generate(pipe, call, steps=4)
        report = handle.report()
    assert {row.kernel for row in report.rows} == {"stock", "triton"}
    assert all(row.ms is not None and row.ms > 0 for row in report.rows)
    assert report.attention_share is not None
    assert 0 < report.attention_share < 1


def test_head_dims_the_kernel_does_not_take_fall_back_with_the_reason() -> None:
    pipe, call = tiny.wan()  # head dim 12
    pipe.to("cuda", torch.bfloat16)
    with dit_accel.accelerate(pipe, test_hosts.SPARSE) as handle:
        tiny.generate(pipe, call)
    assert any("the fast kernel was not used: head dim 12" in note for note in handle.report().notes)


def test_non_finite_latents_raise_one_step_later() -> None:
    pipe, call = tiny.flux()
    pipe.to("cuda")
    with dit_accel.accelerate(pipe, test_hosts.SPARSE), pytest.raises(NonFiniteError, match="handed in"):
        tiny.generate(pipe, call, steps=3, latents=torch.full((1, 221, 4), float("nan")))


def test_plans_follow_the_device() -> None:
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, test_hosts.SPARSE) as handle:
        tiny.generate(pipe, call)
        pipe.to("cuda")
        tiny.generate(pipe, call)
        assert handle.report().sparse_calls > 0
        pipe.to("cpu")
        tiny.generate(pipe, call)


def test_decisions_do_not_wait_for_the_device() -> None:
    """Planning and running a sparse call must not read anything back from the GPU, once its layout is known."""
    layout = dit_accel.TokenLayout(grid=(1, 64, 64), text=64)
    q, k, v = (torch.randn(1, layout.length, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for recipe in ("draft", "balanced", "grat"):
        state = dit_accel.AttentionState()
        dit_accel.attention(q, k, v, layout=layout, recipe=recipe, density=0.3, state=state)  # compile, upload
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            dit_accel.attention(q, k, v, layout=layout, recipe=recipe, density=0.3, state=state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("how", ["regional", "whole"])
@pytest.mark.parametrize("name", ["flux", "wan_two_experts"])
def test_compiled_is_eager_within_rounding(
    name: str, how: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor around our kernel: another plan at each step, nothing compiled or captured that should be asked anew.

    Graphs are not partitioned: torch 2.11 fails an assertion of its own where they are (docs/compile.md).
    """
    monkeypatch.setattr("torch._inductor.config.graph_partition", False)
    pipe, call = tiny.FAMILIES[name]()
    pipe.to("cuda")
    with dit_accel.accelerate(pipe, test_hosts.SPARSE, dense_steps=0.25) as handle:
        eager, rows = tiny.generate(pipe, call, steps=4), handle.report().rows
        if how == "regional":
            pipe.transformer.compile_repeated_blocks(fullgraph=True, mode=mode)
        else:
            pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, mode=mode)
        for _ in range(2):
            ours = tiny.generate(pipe, call, steps=4)
            assert float((ours - eager).norm() / eager.norm()) < 1e-3
            seen = [(row.steps, row.kind, row.calls, row.kernel, row.reason) for row in handle.report().rows]
            assert seen == [(row.steps, row.kind, row.calls, row.kernel, row.reason) for row in rows]
