"""Padding of clusters in blocks: by hand, against the engine's plan, and that the check can fail."""

from __future__ import annotations

import pytest
import torch

from dit_accel.eval import bench_padding
from dit_accel.eval.bench_padding import Clusters


def clusters(q: list[int], k: list[int], mask: list[list[int]]) -> Clusters:
    return Clusters("made", torch.tensor([q]), torch.tensor([k]), torch.tensor([mask]).bool())


def test_by_hand() -> None:
    """Clusters of 17 and 40 queries, of 16 and 5 keys: 17 x 16 in 32 x 16 slots, and 40 x 5 in 48 x 16."""
    found = clusters([17, 40], [16, 5], [[1, 0], [0, 1]])
    assert found.waste(16, 16) == pytest.approx(1 - (17 * 16 + 40 * 5) / (32 * 16 + 48 * 16))
    assert found.waste(1, 1) == 0
    assert clusters([64], [128], [[1]]).waste(64, 64) == 0


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("blocks", [(64, 64), (32, 16)])
def test_counted_as_the_engine_plans(spread: float, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_padding, "TOKENS", 1_111)
    found = bench_padding.drawn(spread, torch.Generator().manual_seed(1), (7, 19))
    assert int(found.q.sum()) == int(found.k.sum()) == 1_111
    assert bench_padding.plan_waste(bench_padding.plan_of(found, *blocks)) == pytest.approx(found.waste(*blocks))


def test_a_count_that_differs_from_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clusters, "waste", lambda *_: 0.1)
    with pytest.raises(RuntimeError, match="the engine's plan wastes"):
        bench_padding.checked(clusters([17, 40], [16, 41], [[1, 0], [0, 1]]))


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench_padding.main(["--no-model"])
    shown = capsys.readouterr().out
    assert all(f"spread {spread}" in shown for spread in bench_padding.SPREADS)


@pytest.mark.full
def test_clusters_of_the_demo_model() -> None:
    """Seconds of a clip; as many tokens a cluster as at 75,600, and all of the grid's."""
    found = [bench_padding.checked(one) for one in bench_padding.of_demo_model()]
    assert len(found) == 4
    for one in found:
        assert one.q.sum(-1).unique().tolist() == one.k.sum(-1).unique().tolist()
        assert float(one.k.double().mean()) == pytest.approx(75.6, abs=3)
        assert 0 < float(one.mask.float().mean()) < 1
