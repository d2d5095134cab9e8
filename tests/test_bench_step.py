"""The step benchmark: its path on tiny models, its arithmetic by hand, and that its check can fail."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dit_accel import attend
from dit_accel.eval import bench_step, step_cases, step_clock, step_compiled, step_model
from dit_accel.sparsity.recipes import resolve

KINDS = step_cases.CASES[:4]  # the others are these models at other sizes, and the same tiny twins
TINY = [step_cases.tiny(case) for case in KINDS]


def bench(out: Path, *options: str) -> dict[str, Any]:
    bench_step.main(["--tiny", "--repeats", "1", "--out", str(out), "--commit", "abc", *options])
    (file,) = out.glob("step_tiny_*.json")
    assert not list(out.glob("*.part"))
    return json.loads(file.read_text())


def test_every_case_is_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path, "--densities", "0.5", "0.3", "--cases", *(case.name for case in KINDS))
    rows = [bench_step.read_row(row) for row in result["rows"]]
    assert [(r.case, r.asked) for r in rows] == [(case.name, d) for case in TINY for d in (0.5, 0.3)]
    assert {result[key] for key in ("commit", "recipe")} == {"abc", "balanced"}
    for row in rows:
        assert all(x > 0 for x in asdict(row).values() if isinstance(x, float)), row
        assert row.error < 1e-5
        assert abs(row.density - row.asked) < 0.15, row
        assert row.speedup == pytest.approx(row.stock_step_ms / row.step_ms)
        rest = row.stock_step_ms * (1 - row.attention_share)
        kept = row.stock_step_ms * row.attention_share * row.density
        assert row.bound == pytest.approx(row.stock_step_ms / (rest + kept))
    assert [(r.measured_layers, r.depth) for r in rows[::2]] == [(2, 40), (2, 60), (2, 30), (2, 57)]
    assert [r.tokens for r in rows[::2]] == [5 * 7 * 11, 5 * 7 * 11 + 16, 5 * 7 * 11, 23 * 29 + 16]
    shown = capsys.readouterr().out
    assert all(case.name in shown for case in TINY)
    assert "Amdahl" in shown


@pytest.mark.parametrize("name", ["wan-1.3b-480p-81", "flux-4096"])
def test_compiled_steps_stand_beside_eager_ones(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two kinds of blocks in Flux, one in Wan: compiled once, timed without compiling again, and undone."""
    result = bench(tmp_path, "--densities", "0.5", "0.3", "--cases", name, "--compiled", "aot_eager")
    rows = [bench_step.read_row(row) for row in result["rows"]]
    assert [row.asked for row in rows] == [0.5, 0.3]
    for row in rows:
        assert row.compiled is not None
        assert row.compiled.backend == "aot_eager"
        assert row.compiled.error == 0  # this backend runs the very same operations
        assert row.compiled.density == row.density
        assert row.compiled.speedup == pytest.approx(row.compiled.stock_step_ms / row.compiled.step_ms)
        saved = row.attention_share * row.stock_step_ms * (1 - row.density)
        assert row.compiled.bound == pytest.approx(row.compiled.stock_step_ms / (row.compiled.stock_step_ms - saved))
    assert "repeated blocks compiled" in capsys.readouterr().out


@torch.no_grad()
def test_compiled_blocks_are_clocked_and_may_not_compile_again() -> None:
    made = step_model.Bench(TINY[2], torch.device("cpu"), torch.float32, repeats=1)
    made.forward()
    counters.clear()
    made.watch.read()
    with made.compiled("aot_eager"):
        made.forward()
        assert counters["stats"]["unique_graphs"] == 1
        assert len(made.watch.read()["blocks"]) == TINY[2].layers

        def longer(index: int) -> None:
            made.inputs["hidden_states"] = torch.randn(1, 16, 5, 14, 22 + 2 * index)

        with pytest.raises(RuntimeError, match="recompile"):
            made.timed(longer)
    made.watch.read()
    made.forward()
    assert len(made.watch.read()["blocks"]) == TINY[2].layers
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_a_wrong_compiled_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = step_model.Bench(TINY[2], torch.device("cpu"), torch.float32, repeats=1)
    answers = iter([torch.ones(3), torch.tensor([1.0, 1.0, 1.2])])
    monkeypatch.setattr(step_compiled, "first_answer", lambda *_: next(answers))
    recipe = resolve("balanced", density=0.5, dense_steps=0, dense_layers=0)
    with pytest.raises(RuntimeError, match=r"relative error 0\.1"):
        next(step_compiled.compiled_steps(made, [recipe], step_clock.StepTime(1.0), "eager"))


def test_rows_of_other_cases_are_kept_unless_the_source_changed(tmp_path: Path) -> None:
    for names in (["flux-4096"], ["wan-1.3b-480p-81"]):
        result = bench(tmp_path, "--densities", "0.5", "--cases", *names)
    assert [row["case"] for row in result["rows"]] == ["tiny-flux-4096", "tiny-wan-1.3b-480p-81"]
    result = bench(tmp_path, "--densities", "0.5", "--cases", "flux-4096", "--commit", "another")
    assert [row["case"] for row in result["rows"]] == ["tiny-flux-4096"]


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attend.run
    monkeypatch.setattr(attend, "run", lambda plan, q, k, v, *rest: right(plan, q, k, v.roll(1, 2), *rest))
    with pytest.raises(SystemExit, match="not measured: tiny-wan"):
        bench(tmp_path, "--densities", "0.5", "--cases", "wan-1.3b-480p-81")
    assert not list(tmp_path.iterdir())


def test_extrapolation_by_hand() -> None:
    spans = {
        "forward": [100.0, 104.0, 900.0],
        "double": [20.0, 22.0, 21.0],
        "single": [30.0, 10.0, 12.0, 14.0],
        "attention double": [15.0],
        "attention single": [6.0, 8.0],
    }
    time = step_clock.extrapolate(spans, {"double": 19, "single": 38}, layers=2)
    rest = 104 - 2 * (21 + 13)
    assert time.step == rest + 19 * 21 + 38 * 13
    assert time.attention == 19 * 15 + 38 * 7
    assert time.layer == 15


def test_true_shapes() -> None:
    """Tokens and parameters a block of the real models, which the cases stand for."""
    wan, hunyuan, small, flux = KINDS
    tokens = {case.name: math.prod(case.grid) // (1 if case.model.name == "flux" else 4) for case in step_cases.CASES}
    assert list(tokens.values()) == [75_600, 118_800, 32_760, 65_536, 16_384, 32_400, 14_040]
    assert [case.depth for case in step_cases.CASES] == [40, 60, 30, 57, 57, 60, 30]
    for case, least, most in (
        (wan, 12.5e9, 14.5e9),
        (hunyuan, 12e9, 13.5e9),
        (small, 1.2e9, 1.5e9),
        (flux, 11.5e9, 12.5e9),
    ):
        with torch.device("meta"):
            model: Any = case.build()
        size = {name: sum(p.numel() for p in getattr(model, name)[0].parameters()) for name in case.groups}
        blocks = sum(case.layers * n for n in size.values())
        rest = sum(p.numel() for p in model.parameters()) - blocks
        assert least < rest + sum(size[name] * depth for name, depth in case.groups.items()) < most, case.name


def test_fp32_parts_stay_as_diffusers_loads_them() -> None:
    model = step_cases.built(TINY[0], torch.device("cpu"), torch.bfloat16)
    dtypes = {name: t.dtype for name, t in [*model.named_parameters(), *model.named_buffers()]}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert dtypes["blocks.0.attn1.to_q.weight"] == dtypes["condition_embedder.text_embedder.linear_1.weight"]
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert {"rope.freqs_cos", "blocks.0.scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"} <= wide
