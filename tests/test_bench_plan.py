"""The table behind a plan's times: made from the step benchmark's results, and refused where these cannot tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dit_accel.errors import ConfigError
from dit_accel.eval import bench_plan, step_cases
from dit_accel.eval.source import RESULTS
from dit_accel.planning import rates
from dit_accel.sparsity.recipes import resolve


def test_too_few_cases_are_refused(tmp_path: Path) -> None:
    file = next(RESULTS.glob("step_nvidia*.json"))
    data = json.loads(file.read_text())
    data["rows"] = [row for row in data["rows"] if row["case"] in ("wan-14b-720p-81", "flux-4096")]
    (tmp_path / file.name).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="2 cases were measured, but leaving one out needs 3"):
        bench_plan.main(["--results", str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_nothing_measured_or_a_broken_result_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no step_"):
        bench_plan.main(["--results", str(tmp_path)])
    (tmp_path / "step_x.json").write_text('{"gpu": "x", "rows": [{"case": "y"}]}')
    with pytest.raises(ConfigError, match="is no result of the step benchmark"):
        bench_plan.main(["--results", str(tmp_path)])


@pytest.mark.full
@pytest.mark.parametrize("name", [case.name for case in step_cases.CASES])
def test_every_case_of_the_step_benchmark_can_be_judged(name: str) -> None:
    """True models at full depth, counted without a device; marked full for the seconds that takes."""
    row = dict.fromkeys(("density", "step_ms", "kernel_ms", "decision_ms", "reuse_ms", "attention_share"), 0.5)
    case = bench_plan.measured_case(name, resolve("balanced"), [{**row, "stock_step_ms": 2.0, "sdpa_ms": 1.0}])
    (true,) = (case for case in step_cases.CASES if case.name == name)
    assert case.sites == true.depth
    assert case.masked == (true.model.name == "hunyuan-video")
    assert case.slots >= case.tokens - (true.text // 2 if case.masked else 0)
    assert case.whole == (true.model.name == "flux")
    assert case.pooled >= case.slots // 64  # mean keys of 64 tokens


@pytest.mark.full
def test_only_a_corrected_recipe_counts_its_mean_keys() -> None:
    row = dict.fromkeys(("density", "step_ms", "kernel_ms", "decision_ms", "reuse_ms", "attention_share"), 0.5)
    rows = [{**row, "stock_step_ms": 2.0, "sdpa_ms": 1.0}]
    case = bench_plan.measured_case("flux-4096", resolve("hilbert-ear", density=0.3), rows)
    assert case.pooled == 2 * case.units == 2 * case.slots // 128
    assert bench_plan.measured_case("flux-4096", resolve("draft", density=0.3), rows).pooled == 0


@pytest.mark.full
def test_the_committed_table_is_what_the_committed_results_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All true models at full depth; marked full for the seconds that takes."""
    committed = json.loads(rates.TABLE.read_text())
    for file in RESULTS.glob("step_nvidia*.json"):
        shutil.copy(file, tmp_path)
    out = tmp_path / "out.json"
    bench_plan.main(["--results", str(tmp_path), "--out", str(out)])
    assert json.loads(out.read_text()) == committed
    assert "mean absolute error" in capsys.readouterr().out
