"""The presets' table: read as measured, interpolated sanely, and never claimed for devices nobody measured."""

from __future__ import annotations

import pytest
import torch

from dit_accel.eval import bench_crossover
from dit_accel.sparsity.crossover import crossover_tokens, expected_gain, slower_reason, table

ROWS = [
    {"tokens": t, "density": d, "dense_ms": dense, "sparse_ms": sparse}
    for t, dense in ((1024, 1.0), (4096, 16.0), (16384, 256.0))
    for d, sparse in ((0.2, 2.0 + dense * 0.2), (0.5, 2.0 + dense * 0.5))
]


def test_gain_is_the_measured_one_at_measured_points() -> None:
    assert expected_gain(4096, 0.2, ROWS) == pytest.approx(16 / 5.2)
    assert expected_gain(4096, 0.5, ROWS) == pytest.approx(16 / 10)


def test_gain_between_points_lies_between_and_asks_the_next_larger_density() -> None:
    middle = expected_gain(2048, 0.2, ROWS)
    assert expected_gain(1024, 0.2, ROWS) < middle < expected_gain(4096, 0.2, ROWS)
    assert expected_gain(4096, 0.3, ROWS) == expected_gain(4096, 0.5, ROWS)


def test_gain_outside_the_table_is_that_of_its_edge() -> None:
    assert expected_gain(64, 0.2, ROWS) == expected_gain(1024, 0.2, ROWS)
    assert expected_gain(10**6, 0.2, ROWS) == expected_gain(16384, 0.2, ROWS)


def test_the_committed_table_is_whole() -> None:
    assert table()["cpu"]
    for rows in table().values():
        for row in rows:
            assert set(row) == {"tokens", "density", "dense_ms", "sparse_ms"}
            assert min(row.values()) > 0


def test_a_device_without_measurements_stays_dense() -> None:
    assert "no measurement" in slower_reason(10**6, 0.2, torch.device("meta"))


def test_short_sequences_stay_dense_with_the_figure() -> None:
    assert "256 tokens: dense is faster on cpu (measured 0." in slower_reason(256, 0.2, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_crossover_lies_where_the_gain_passes_one(kind: str) -> None:
    tokens = crossover_tokens(0.2, torch.device(kind))
    assert tokens is not None
    rows = table()[kind]
    assert expected_gain(tokens, 0.2, rows) > 1 >= expected_gain(int(tokens * 0.95), 0.2, rows)


def test_nothing_measured_has_no_crossover() -> None:
    assert crossover_tokens(0.2, torch.device("meta")) is None


@pytest.mark.parametrize("name", ["balanced", "hilbert-ear"])
def test_a_row_is_measured_for_any_recipe(name: str) -> None:
    row = bench_crossover.measure(name, 8, 0.5, torch.device("cpu"), repeats=1)
    assert row["tokens"] == 64
    assert row["density"] == 0.5
    assert min(row.values()) > 0
