"""The benchmark of int8: its path on tiny shapes, and that its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.eval import bench_quantised as bench
from dit_accel.kernels.block_sparse import quantised

SMALL = {"num_inference_steps": 1, "height": 32, "width": 32, "max_sequence_length": 16}


def test_errors_and_times_are_written_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TINY_SIZE", SMALL)
    bench.main(["--tiny", "--out", str(tmp_path), "--commit", "abc"])
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["commit"] == "abc"
    real = [bench.Real(**one) for one in result["real"]]
    assert len(real) == len(bench.SITES)
    for one in real:
        assert 0 < one.given < one.int8 < 2e-2
    rows = [bench.Row(**row) for row in result["rows"]]
    assert {row.kernel.split()[0] for row in rows} == {"given", "int8"}
    for row in rows:
        assert row.ms > 0
        assert row.error < bench.WORST_NOISE


def kept_mean(patch: pytest.MonkeyPatch) -> None:
    right = quantised.on_rounded

    def without(problem: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(problem, run)
        return out, lse - quantised.rounded_problem(problem)[1]

    patch.setattr(quantised, "on_rounded", without)


def coarse_steps(patch: pytest.MonkeyPatch) -> None:
    """Seven levels a side in what runs, not in what it is held against."""
    right = quantised.on_rounded

    def coarse(problem: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with pytest.MonkeyPatch.context() as levels:
            levels.setattr(quantised, "LEVELS", 7)
            return right(problem, run)

    patch.setattr(quantised, "on_rounded", coarse)


@pytest.mark.parametrize("mistake", [kept_mean, coarse_steps])
def test_what_is_wrong_is_not_timed(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    case = bench.Case("offset", 96, 1, 32, blocks=((32, 32),), densities=(0.7,))
    right = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: right(*shape, **options) + 2.0)
    with pytest.raises(RuntimeError, match=r"int8 .* errs by"):
        list(bench.time_case(case, torch.device("cpu")))
