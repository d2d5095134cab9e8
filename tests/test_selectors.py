"""Axes 2 and 3 against slow, obvious restatements; budgets, ties, NaN, empty rows."""

from __future__ import annotations

import pytest
import torch

from dit_accel.sparsity import selectors


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, cols = (int(n) for n in torch.randint(2, 20, (2,), generator=g))
    score = torch.rand(2, 3, rows, cols, generator=g)
    keep = torch.rand(rows, cols, generator=g) < 0.1
    tokens_r = torch.randint(1, 65, (rows,), generator=g).float()
    tokens_c = torch.randint(1, 65, (cols,), generator=g).float()
    print("seed", seed)
    return score, keep, tokens_r, tokens_c


def slow_fill(entries: list[tuple[float, int]], costs: list[float], budget: float) -> set[int]:
    """Take the best entries while the running cost, less half of the entry's own, stays within the budget."""
    taken, spent = set(), 0.0
    for _, i in sorted(entries, key=lambda e: -e[0]):
        spent += costs[i]
        if spent - costs[i] / 2 <= budget:
            taken.add(i)
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_top_k_against_a_slow_restatement(seed: int) -> None:
    score, keep, _, cols = draw(seed)
    share = 0.05 + 0.9 * seed / 20
    mask = selectors.top_k(score, keep, cols, share)
    for b in range(2):
        for h in range(3):
            for r in range(score.shape[2]):
                entries = [(2.0 if keep[r, c] else float(score[b, h, r, c]), c) for c in range(score.shape[3])]
                best = slow_fill(entries, cols.tolist(), share * float(cols.sum()))
                best |= set(keep[r].nonzero().flatten().tolist()) | {max(entries)[1]}
                assert set(mask[b, h, r].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("seed", range(20))
def test_percentile_against_a_slow_restatement(seed: int) -> None:
    score, keep, rows, cols = draw(seed)
    share = 0.02 + 0.9 * seed / 20
    mask = selectors.percentile(score, keep, rows, cols, share)
    n = score.shape[3]
    for b in range(2):
        for h in range(3):
            flat, kept = score[b, h].flatten().tolist(), keep.flatten().tolist()
            costs = (rows[:, None] * cols[None]).flatten().tolist()
            entries = [(2.0 if kept[i] else flat[i], i) for i in range(len(flat))]
            best = slow_fill(entries, costs, share * sum(costs)) | {i for i, k in enumerate(kept) if k}
            for r in range(score.shape[2]):
                if not any(i // n == r for i in best):
                    best.add(max(range(r * n, r * n + n), key=lambda i: flat[i]))
            assert set(mask[b, h].flatten().nonzero().flatten().tolist()) == best
    assert mask.any(-1).all()


@pytest.mark.parametrize("seed", range(10))
def test_top_p_against_a_slow_restatement(seed: int) -> None:
    score, keep, *_ = draw(seed)
    p = 0.1 + 0.09 * seed
    mask = selectors.top_p(score, keep, p)
    for b in range(2):
        for h in range(3):
            for r in range(score.shape[2]):
                row = score[b, h, r] / score[b, h, r].sum()
                best, mass = set(keep[r].nonzero().flatten().tolist()), 0.0
                for c in sorted(range(len(row)), key=lambda c: -float(row[c])):
                    if mass >= p:
                        break
                    best.add(c)
                    mass += float(row[c])
                assert set(mask[b, h, r].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_undecidable_scores_are_computed(bad: float) -> None:
    score, keep, rows, cols = draw(3)
    score[0, 0, 1] = bad
    for mask in (
        selectors.top_k(score, keep, cols, 0.1),
        selectors.percentile(score, keep, rows, cols, 0.1),
        selectors.top_p(score, keep, 0.1),
        selectors.within(score, keep, 0),
    ):
        assert mask[0, 0, 1].all()


def test_rows_of_other_samples_do_not_matter() -> None:
    score, keep, rows, cols = draw(5)
    alone = selectors.percentile(score[1:], keep, rows, cols, 0.3)
    assert torch.equal(selectors.percentile(score, keep, rows, cols, 0.3)[1:], alone)


def test_no_row_is_empty_at_the_smallest_share() -> None:
    score = torch.zeros(1, 1, 6, 6)
    score[..., 0] = 1
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    ones = torch.ones(6)
    assert selectors.percentile(score, nothing, ones, ones, 1e-6).any(-1).all()
    assert selectors.top_k(score, nothing, ones, 1e-6).any(-1).all()
