"""The best pairs within a budget, by row and by head: one table for both back ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dit_accel.kernels.budget import fill_heads, fill_rows

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def scores(rng, shape, ties=False, bad=0.0):
    """Random scores, on a few levels or all different, some of them not finite."""
    made = torch.randn(shape, generator=rng)
    made = (made * 2).round() / 4 if ties else made  # halves round to even: both zeros occur
    for value in (math.nan, math.inf, -math.inf):
        made[torch.rand(shape, generator=rng) < bad] = value
    return made


def taken(score, keep, cost, budget):
    """The definition for one list of pairs: which are taken, and which would be kept anyway."""
    kept = [bool(k) or not math.isfinite(s) for s, k in zip(score, keep, strict=True)]
    ranks = sorted(range(len(score)), key=lambda i: (not kept[i], 0.0 if kept[i] else -score[i], i))
    out, spent = set(), 0.0
    for i in ranks:
        spent += cost[i]
        if spent - cost[i] / 2 > budget:
            break
        out.add(i)
    return out, {i for i in range(len(score)) if kept[i]}, ranks[0]


def slow_rows(score, keep, cost, budget):
    out = torch.zeros(score.shape, dtype=torch.bool)
    b, h, r, c = score.shape
    keep, cost = keep.expand(b, h, r, c), (cost if cost.dim() == 3 else cost[None, None]).expand(b, h, c)
    for i, j, k in itertools.product(range(b), range(h), range(r)):
        limit = budget.expand(b, h, r, 1)[i, j, k] if isinstance(budget, torch.Tensor) else budget * cost[i, j].sum()
        got, kept, best = taken(score[i, j, k].tolist(), keep[i, j, k].tolist(), cost[i, j].tolist(), float(limit))
        out[i, j, k, list(got | kept | {best})] = True
    return out


def slow_heads(score, keep, row_cost, col_cost, share):
    out = torch.zeros(score.shape, dtype=torch.bool)
    b, h, r, c = score.shape
    row_cost, col_cost = ((x if x.dim() == 3 else x[None, None]).expand(b, h, -1) for x in (row_cost, col_cost))
    for i, j in itertools.product(range(b), range(h)):
        pairs = torch.outer(row_cost[i, j], col_cost[i, j]).flatten()
        flat = (score[i, j].flatten().tolist(), keep.expand(score.shape)[i, j].flatten().tolist(), pairs.tolist())
        got, kept, _ = taken(*flat, float(share * pairs.sum()))
        mask = torch.zeros(r * c, dtype=torch.bool)
        mask[list(got)] = True
        for k in range(r):
            row = mask.view(r, c)[k]
            here = [n - k * c for n in kept if k * c <= n < (k + 1) * c]
            if not row.any():
                row[taken(score[i, j, k].tolist(), keep.expand(score.shape)[i, j, k].tolist(), [1.0] * c, 0.0)[2]] = (
                    True
                )
            row[here] = True
        out[i, j] = mask.view(r, c)
    return out


def tokens(rng, *shape):
    return torch.randint(0, 129, shape, generator=rng).float()


ROWS = {
    "plain": {},
    "ties": {"ties": True, "columns": 33},
    "not finite": {"bad": 0.1, "ties": True},
    "one column": {"columns": 1, "share": 0.01},
    "cost by head, budget by row": {"cost": (2, 2), "budget": True},
    "budget by head": {"cost": (1, 2), "budget": (2, 2, 1)},
    "nothing fits": {"share": 0.0},
    "everything fits": {"share": 1.0, "bad": 0.1},
}


@on_both
@pytest.mark.parametrize("case", ROWS)
def test_rows_are_filled_as_defined(case, backend, device):
    given = {"columns": 19, "share": 0.4, "cost": (), "budget": None, "ties": False, "bad": 0.0, **ROWS[case]}
    rng = torch.Generator().manual_seed(sorted(ROWS).index(case))
    shape = (2, 2, 1, given["columns"])
    score = scores(rng, shape, given["ties"], given["bad"])
    keep, cost = torch.rand(shape[2:], generator=rng) < 0.1, tokens(rng, *given["cost"], given["columns"])
    budget = given["share"]
    if given["budget"]:
        lead = (2, 2, 1) if given["budget"] is True else given["budget"]
        budget = torch.rand(*lead, 1, generator=rng) * 600
    moved = budget.to(device) if isinstance(budget, torch.Tensor) else budget
    out = fill_rows(score.to(device), keep.to(device), cost.to(device), moved, backend=backend)
    assert out.dtype == torch.bool
    assert torch.equal(out.cpu(), slow_rows(score, keep, cost, budget))


@on_both
@pytest.mark.parametrize("seed", range(4))
def test_heads_are_filled_as_defined(seed, backend, device):
    rng = torch.Generator().manual_seed(40 + seed)
    rows, columns = (int(torch.randint(1, n, (1,), generator=rng)) for n in (5, 40))
    share, lead = float(torch.rand(1, generator=rng)), ((), (1, 2))[seed % 2]
    print("seed", seed, rows, columns, share)
    score = scores(rng, (1, 2, rows, columns), ties=seed > 1, bad=0.05 * (seed % 3))
    keep = torch.rand(rows, columns, generator=rng) < 0.1
    row_cost, col_cost = tokens(rng, *lead, rows), tokens(rng, *lead, columns)
    moved = (x.to(device) for x in (score, keep, row_cost, col_cost))
    out = fill_heads(*moved, share, backend=backend)
    assert torch.equal(out.cpu(), slow_heads(score, keep, row_cost, col_cost, share))


@on_both
def test_strides_and_kept_pairs_by_head(backend, device):
    rng = torch.Generator().manual_seed(5)
    score, keep, cost = scores(rng, (2, 1, 1, 40)), torch.rand(2, 1, 1, 40, generator=rng) < 0.2, tokens(rng, 40)
    wide = torch.zeros(2, 1, 1, 80)
    wide[..., ::2] = score
    out = fill_rows(wide.to(device)[..., ::2], keep.to(device), cost.to(device), 0.3, backend=backend)
    assert torch.equal(out.cpu(), slow_rows(score, keep, cost, 0.3))
    flipped = score.to(device).transpose(0, 1)  # heads before samples in memory
    out = fill_heads(
        flipped, keep.to(device).transpose(0, 1), cost[:1].to(device), cost.to(device), 0.3, backend=backend
    )
    expected = slow_heads(score.transpose(0, 1), keep.transpose(0, 1), cost[:1], cost, 0.3)
    assert torch.equal(out.cpu(), expected)


def test_sums_beyond_24_bits_are_exact_by_head(device):
    """Over 2**24 tokens a float's sum would swallow single ones, and all of them would fit."""
    score, keep = torch.arange(8.0).flip(0).view(1, 1, 1, 8), torch.zeros(1, 8, dtype=torch.bool)
    cost = torch.tensor([2.0**25, 1, 1, 1, 1, 1, 1, 2.0**25])
    given = (x.to(device) for x in (score, keep, torch.ones(1), cost))
    out = fill_heads(*given, 0.5, backend="triton")  # half of 2**26 + 6, rounded to a multiple of 4
    assert out.cpu().flatten().tolist() == [True] * 5 + [False] * 3


def test_nothing_to_rank(device):
    empty = torch.zeros(0, 2, 3, 4, device=device)
    keep, cost = torch.zeros(3, 4, dtype=torch.bool, device=device), torch.ones(4, device=device)
    assert fill_rows(empty, keep, cost, 0.5, backend="triton").shape == empty.shape
    assert fill_heads(empty, keep, torch.ones(3, device=device), cost, 0.5, backend="triton").shape == empty.shape


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"score": torch.zeros(2, 3, 4)}, ValueError, "score is [2, 3, 4]"),
        ({"score": torch.zeros(1, 2, 3, 4).double()}, ValueError, "torch.float64; expected float32"),
        ({"keep": torch.zeros(3, 4)}, TypeError, "keep is torch.float32"),
        ({"keep": torch.zeros(5, 1, 3, 4, dtype=torch.bool)}, ValueError, "keep is [5, 1, 3, 4]"),
        ({"cost": torch.ones(5)}, ValueError, "cost is [5]; expected [4]"),
        ({"cost": torch.ones(4).long()}, TypeError, "cost is torch.int64"),
        ({"budget": torch.ones(4)}, ValueError, "budget is [4]"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
        ({"score": torch.zeros(1, 1, 1, 9000), "keep": torch.zeros(1, 1, dtype=torch.bool), "cost": torch.ones(9000),
          "backend": "triton"}, RuntimeError, "9000 columns are more than 8192"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_was_given(changed, error, words):
    given = {
        "score": torch.zeros(1, 2, 3, 4),
        "keep": torch.zeros(3, 4, dtype=torch.bool),
        "cost": torch.ones(4),
        "budget": 0.5,
        "backend": "reference",
        **changed,
    }
    backend = given.pop("backend")
    with pytest.raises(error) as told:
        fill_rows(*given.values(), backend=backend)
    assert words in str(told.value)
