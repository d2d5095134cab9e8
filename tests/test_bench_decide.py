"""The benchmark of planned calls: its path on tiny shapes, its counts and arithmetic, and that its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.eval import bench_decide, decide_calls, modelled, step_cases
from dit_accel.eval.decide_stages import DECISION, Clock, Launches, staged
from dit_accel.eval.store import DensityMap, Row
from dit_accel.kernels import choice
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import selectors


def bench(out: Path, *recipes: str) -> dict[str, Any]:
    bench_decide.main(["--tiny", "--repeats", "1", "--out", str(out), "--commit", "abc", "--recipes", *recipes])
    (file,) = out.glob("decide_tiny_*.json")
    assert not list(out.glob("*.part"))
    return json.loads(file.read_text())


def test_recipes_are_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path, "fast", "grat-b", "svg-ear", "rettention")
    assert result["commit"] == "abc"
    assert {"gpu", "torch", "triton", "case", "layout"} < set(result)
    fast, grat, ear, _ = result["rows"]
    assert {kind: times["calls"] for kind, times in fast["kinds"].items()} == {"first": 13, "kept": 37}
    assert list(ear["kinds"]) == ["first", "again"]
    for row in result["rows"]:
        assert row["error"] < 1e-5
        assert row["dense_ms"] > 0
        spent = sum(
            times["calls"] * sum(times["eager"][stage] for stage in DECISION) for times in row["kinds"].values()
        )
        calls = sum(times["calls"] for times in row["kinds"].values())
        assert row["decision_ms"] == pytest.approx(spent / calls)
        assert row["share"] == pytest.approx(row["decision_ms"] / row["dense_ms"])
    assert fast["kinds"]["first"]["eager"]["score"] > 0 == fast["kinds"]["kept"]["eager"]["score"]
    assert grat["decision_ms"] == 0
    again = ear["kinds"]["again"]["eager"]
    assert min(again[stage] for stage in ("order", "correct", "kernel")) > 0
    assert again["merge"] == 0  # the branch of means goes on from what the other came to
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("fast", "grat-b", "svg-ear", "again"))


@pytest.mark.parametrize(("kind", "most"), [("first", 32), ("kept", 7)])
def test_a_density_by_error_launches_little(kind: str, most: int) -> None:
    recipe = decide_calls.shrunk("hilbert-ear").override(density=0.3, every=4)
    calls = decide_calls.Calls(recipe, decide_calls.COUNTED, torch.device("cpu"), torch.bfloat16)
    with bench_decide.as_on_an_h100():
        assert bench_decide.counted(calls, kind).total() <= most


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [("balanced", "first", 32), ("fast", "kept", 7), ("draft", "first", 21), ("grat-b", "kept", 2)],
)
def test_a_planned_call_launches_little(name: str, kind: str, most: int) -> None:
    """What a GPU is given for one call; the presets' was 87 before the kernels that decide."""
    calls = decide_calls.Calls(decide_calls.shrunk(name), decide_calls.COUNTED, torch.device("cpu"), torch.bfloat16)
    with bench_decide.as_on_an_h100():
        launches = bench_decide.counted(calls, kind)
    assert launches.by_stage["kernel"] == {"triton attention_kernel": 1}
    assert launches.by_stage["gather"] == {"triton pack_kernel": 1}
    assert launches.total() <= most, launches.by_stage


def test_the_table_of_launches(capsys: pytest.CaptureFixture[str]) -> None:
    bench_decide.main(["--count", "--recipes", "gna"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "gna" in line)
    assert line.split("|")[1:4] == [" gna    ", " kept ", "       50 "]
    assert line.split("|")[-2].strip() == "4"  # keys packed once, two branches, their merge


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grat-b", {"kept": 50}),
        ("balanced", {"first": 13, "kept": 37}),
        ("dfs", {"first": 5, "kept": 45}),
        ("adaspa", {"first": 1, "again": 2, "kept": 47}),
        ("svg2", {"first": 1, "again": 49}),
        ("tidal", {"first": 200, "kept": 1800}),
        ("rettention", {"kept": 40}),
    ],
)
def test_kinds_of_calls_in_a_run(name: str, expected: dict[str, int]) -> None:
    assert decide_calls.uses(decide_calls.always_sparse(name)) == expected


def test_the_flux_4096_case_is_the_call_of_the_step_benchmarks() -> None:
    """The step benchmark's model is built on no device, and its host says how its tokens lie."""
    there = next(case for case in step_cases.CASES if case.name == "flux-4096")
    case = next(case for case in decide_calls.CASES if case.name == "flux-4096")
    with torch.device("meta"):
        model: Any = there.build()
    arguments = there.inputs(torch.device("meta"), torch.bfloat16)
    text, cells = arguments["encoder_hidden_states"].shape[1], arguments["hidden_states"].shape[1]
    assert case.layout == TokenLayout(grid=there.grid, text=text)
    assert case.layout.length == text + cells == 66048
    assert (case.heads, case.heads * case.dim) == (model.transformer_blocks[0].attn.heads, model.inner_dim)
    calls = decide_calls.Calls(decide_calls.always_sparse("balanced"), case, torch.device("meta"), torch.bfloat16)
    assert calls.call(0).q.shape == (1, 66048, 24, 128)


def test_modelled_times_find_the_flux_4096_file(tmp_path: Path) -> None:
    gpu, case = "NVIDIA H100 80GB HBM3", bench_decide.parse(["--case", "flux-4096"]).case
    step = {"case": case, "density": 0.2, "step_ms": 1000.0, "stock_step_ms": 3000.0, "depth": 57, "every": 1}
    (tmp_path / "step_gpu.json").write_text(json.dumps({"gpu": gpu, "recipe": "draft", "rows": [step]}))
    (before,) = modelled.models(tmp_path)
    stages: bench_decide.Ms = dict.fromkeys((*DECISION, "kernel", "merge"), 1.0)
    times = bench_decide.Times(50, stages, stages, stages, {})
    rows = [
        bench_decide.Row(name, 0.2, 0.0, 0.0, 90.0, ms, ms / 90, ms / 90, 1.0, True, {"first": times})
        for name, ms in (("draft", 1.0), ("svg-ear", 11.0))
    ]
    where = bench_decide.result_file(tmp_path, next(c for c in decide_calls.CASES if c.name == case), gpu)
    bench_decide.write(where, {"gpu": gpu, "case": case}, rows)
    (after,) = modelled.models(tmp_path)
    seen = DensityMap(sites=("p",), density=((0.2,),))
    given: Any = {"candidate": "x@0.2", "family": "recipe", "prompt": "a", "seed": 0, "steps": 1, "map": seen}
    draft = Row(**given, definition={"name": "draft"})
    ear = Row(**given, definition={"name": "svg-ear", "correct": {"kind": "centroids"}})
    assert before.caveat is not None
    assert "flux-4096" in before.caveat
    assert after.caveat is None
    assert (before.seconds(draft), after.seconds(draft)) == (1.0, 1.0)
    assert after.seconds(ear) == pytest.approx(1.0 + 57 * 10 / 1e3)


def test_nested_stages_count_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.eval import decide_stages

    class Work:
        def outer(self) -> None:
            torch.zeros(2)
            self.inner()
            torch.zeros(2)

        def inner(self) -> None:
            torch.ones(2) + 1

    monkeypatch.setattr(decide_stages, "Work", Work, raising=False)
    where = "dit_accel.eval.decide_stages"
    monkeypatch.setattr(decide_stages, "FUNCTIONS", {f"{where}:Work.outer": "plan", f"{where}:Work.inner": "score"})
    seen: list[str] = []
    with staged(seen.append):
        Work().outer()
    assert seen == ["plan", "score", "plan", ""]
    launches = Launches()
    with launches.watching():
        Work().outer()
        torch.empty(3).view(3)
    assert {stage: sum(counts.values()) for stage, counts in launches.by_stage.items()} == {"plan": 2, "score": 2}
    assert launches.total("score") == 2
    host, device = Clock(torch.device("cpu")).run(lambda: Work().outer())
    assert set(host) == set(device) == {"", "plan", "score"}


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = decide_calls.run
    monkeypatch.setattr(decide_calls, "run", lambda plan, q, k, v, *rest: right(plan, q, k, v.roll(1, 2), *rest))
    with pytest.raises(SystemExit, match="not measured: grat-b"):
        bench(tmp_path, "grat-b")
    assert not list(tmp_path.iterdir())


def test_a_wrong_decision_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selectors.fill_rows

    def worst(score: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(score if choice._preferred.get() == "reference" else -score, *rest)

    monkeypatch.setattr(selectors, "fill_rows", worst)
    with pytest.raises(SystemExit, match="not measured: balanced"):
        bench(tmp_path, "balanced")
    assert "decided otherwise than by torch" in capsys.readouterr().out
