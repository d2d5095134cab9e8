"""The benchmark of means, k-means, norm and rotation: its path on tiny shapes, and that its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.eval import bench_fused


def bench(out: Path, *options: str) -> None:
    bench_fused.main(["--tiny", "--out", str(out), "--commit", "abc", *options])


def test_every_operation_is_checked_timed_and_written(tmp_path: Path) -> None:
    bench(tmp_path)
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert result["commit"] == "abc"
    assert {"gpu", "torch", "triton", "date"} < set(result)
    rows = [bench_fused.Row(**row) for row in result["rows"]]
    for case in bench_fused.TINY:
        names = {row.operation for row in rows if row.case == case.name}
        whats = ("means", f"k-means {case.clusters[0]}")
        assert {f"{what} {by}" for what in whats for by in ("triton", "reference")} <= names
    assert {"errors 3x7 triton", "errors 3x7 reference"} <= {row.operation for row in rows}
    for case in bench_fused.norm_rope_rows.TINY:
        names = {row.operation for row in rows if row.case == case.name}
        assert names >= {f"norm+rope {by}" for by in ("stock", "triton", "reference")}
    for case in bench_fused.ada_norm_rows.TINY:
        names = {row.operation for row in rows if row.case == case.name}
        assert names >= {f"ada-norm {by}" for by in ("stock", "triton", "reference")}
    for case in bench_fused.branch_rows.TINY:
        names = [row.operation for row in rows if row.case == case.name]
        assert len([name for name in names if name.startswith("text")]) == (3 if case.text else 0)
        centroids = f"centroids {case.clusters[0]}x{case.clusters[1]}"
        assert {"columns 5%", f"{centroids} triton", f"{centroids} reference"} <= set(names)
    for row in rows:
        assert row.ms > 0
        assert row.bound_ms > 0
        assert row.error <= bench_fused.WORST_EXCESS


def test_branches_are_counted() -> None:
    """By hand: queries and outputs once, listed keys and values once, and four FLOPs a pair and channel."""
    case = bench_fused.branch_rows.Case("x", 200, 100, 2, 16, (3, 5))
    rows = {row.name: row for row in bench_fused.branch_rows.branch_rows(case, torch.device("cpu"))}
    one, both = rows["text keys 100"], rows["text keys 100, 2 samples"]
    queries, words = 300 * 2 * 16 * 4, 100 * 2 * 16 * 4
    assert one.moved == 2 * queries + 2 * words + 300 * 2 * 4
    assert one.flops == 4 * 300 * 100 * 2 * 16
    assert (both.moved, both.flops) == (2 * (one.moved - 2 * words) + 2 * words, 2 * one.flops)
    assert rows["text queries 100"].flops == one.flops
    assert 0 < rows["centroids 3x5 reference"].flops <= 4 * 200 * 5 * 2 * 16


def test_some_operations_alone_keep_the_rows_of_the_others(tmp_path: Path) -> None:
    bench(tmp_path, "--only", "branches")
    bench(tmp_path, "--only", "norm-rope")
    (file,) = tmp_path.iterdir()
    names = {row["operation"].split()[0] for row in json.loads(file.read_text())["rows"]}
    assert names == {"columns", "text", "centroids", "norm+rope"}


@pytest.mark.parametrize("name", ["block_sparse_attention", "pooled_attention"])
def test_wrong_branches_are_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(bench_fused.branch_rows, name)

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **kwargs)
        return out.roll(1, 1), lse

    monkeypatch.setattr(bench_fused.branch_rows, name, wrong)
    with pytest.raises(RuntimeError, match=r"errs by .* not timed"):
        list(bench_fused.branch_rows.branch_rows(bench_fused.branch_rows.TINY[0], torch.device("cpu")))


def test_wrong_errors_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_fused.error_rows.unit_error
    monkeypatch.setattr(bench_fused.error_rows, "unit_error", lambda *args, **more: right(*args, **more).roll(1, 3))
    with pytest.raises(RuntimeError, match=r"errors 3x7 triton errs by .* not timed"):
        list(bench_fused.run_errors(bench_fused.error_rows.TINY[0], torch.device("cpu")))


def test_bounds_are_the_larger_of_bytes_and_flops() -> None:
    case = bench_fused.TINY[0]
    assert bench_fused.row(case, "x", int, 0.0, 3.35e9).bound_ms == pytest.approx(1)
    both = bench_fused.row(case, "x", int, 0.0, 3.35e9, 2 * 989e9)
    assert (both.bound_ms, both.bound_by) == (pytest.approx(2), "FLOPs")


def test_wrong_means_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_fused.unit_means
    monkeypatch.setattr(bench_fused, "unit_means", lambda *args, **kwargs: right(*args, **kwargs).roll(1, 2))
    with pytest.raises(RuntimeError, match="means triton errs"):
        bench(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_rotation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_fused.norm_rope_rows.qk_norm_rope

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = right(*args, **kwargs)
        return q, k.roll(1, 1)

    monkeypatch.setattr(bench_fused.norm_rope_rows, "qk_norm_rope", wrong)
    for case in bench_fused.norm_rope_rows.TINY:
        with pytest.raises(RuntimeError, match=r"triton errs by .* not timed"):
            list(bench_fused.run_norm_rope(case, torch.device("cpu")))


def test_wrong_norms_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_fused.ada_norm_rows.ada_norm
    monkeypatch.setattr(bench_fused.ada_norm_rows, "ada_norm", lambda *args, **more: right(*args, **more).roll(1, 1))
    for case in bench_fused.ada_norm_rows.TINY:
        with pytest.raises(RuntimeError, match=r"triton errs by .* not timed"):
            list(bench_fused.run_ada_norm(case, torch.device("cpu")))


@pytest.mark.parametrize("what", ["labels", "centroids"])
def test_wrong_clusters_are_not_timed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_fused.kmeans

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels, centroids, sizes = right(*args, **kwargs)
        return (labels.roll(1, 2), centroids, sizes) if what == "labels" else (labels, centroids.roll(1, 2), sizes)

    monkeypatch.setattr(bench_fused, "kmeans", wrong)
    with pytest.raises(RuntimeError, match=f"{what} errs"):
        bench(tmp_path)
    (file,) = tmp_path.iterdir()
    assert {row["operation"] for row in json.loads(file.read_text())["rows"]} == {"means triton", "means reference"}
