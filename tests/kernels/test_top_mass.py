"""Top-p by row: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.kernels.top_mass import top_mass

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])
EDGE = 1e-5  # where the share before a pair is so near to p, rounding decides


def slowly(score, keep, p, least):
    """The definition row by row in float64: which pairs are taken, and which are too near to call."""
    out, near = (torch.zeros(score.shape, dtype=torch.bool) for _ in range(2))
    mass = torch.where(score.isfinite(), score, 0).clamp(min=0).double()
    mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in score.shape[:3])).tolist():
        row, before = mass[tuple(at)].tolist(), 0.0
        floor = least if isinstance(least, float) else float(least.expand(*score.shape[:3], 1)[tuple(at)])
        for rank, i in enumerate(sorted(range(len(row)), key=lambda i: (-row[i], i))):
            fixed = rank < int(floor * len(row)) or not math.isfinite(score[(*at, i)])
            out[(*at, i)] = fixed or before < p
            near[(*at, i)] = not fixed and abs(before - p) < EDGE
            before += row[i]
    keep = keep.expand(score.shape)
    return out | keep, near & ~keep


CASES = {
    "shares": {"p": 0.7},
    "ties": {"p": 0.5, "ties": True, "columns": 33},
    "not finite": {"p": 0.6, "bad": 0.1},
    "at least a quarter": {"p": 0.05, "least": 0.25, "ties": True},
    "a floor by head": {"p": 0.05, "least": torch.tensor([0.1, 0.29], dtype=torch.float64).view(1, 2, 1, 1)},
    "bare products": {"p": 0.8, "bare": True},
    "one column": {"p": 0.3, "columns": 1},
    "only zeros": {"p": 0.3, "zero": True, "least": 0.4},
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_takes_what_the_definition_says(case, backend, device):
    given = {"columns": 21, "least": 0.0, **CASES[case]}
    rng = torch.Generator().manual_seed(sorted(CASES).index(case))
    score = torch.randn(2, 2, 1, given["columns"], generator=rng) * 2
    score = score if "bare" in given else score.softmax(-1)
    score = (score * 8).round() if "ties" in given else score * 0 if "zero" in given else score
    if "bad" in given:
        for value in (math.nan, math.inf, -math.inf):
            score[torch.rand(score.shape, generator=rng) < given["bad"]] = value
    keep = torch.rand(1, given["columns"], generator=rng) < 0.1
    least = given["least"] if isinstance(given["least"], float) else given["least"].to(device)
    out = top_mass(score.to(device), keep.to(device), given["p"], least, backend=backend).cpu()
    expected, near = slowly(score, keep, given["p"], given["least"])
    assert near.float().mean() < 0.1
    assert torch.equal(out | near, expected | near)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"score": torch.zeros(2, 3, 4)}, ValueError, "score is [2, 3, 4]"),
        ({"keep": torch.zeros(3, 4)}, TypeError, "keep is torch.float32"),
        ({"keep": torch.zeros(3, 5, dtype=torch.bool)}, ValueError, "keep is [3, 5]"),
        ({"least": torch.zeros(1, 2, 1, 1)}, ValueError, "least is [1, 2, 1, 1] torch.float32"),
    ],
)
def test_bad_calls_say_what_was_given(changed, error, words):
    given = {"score": torch.zeros(1, 2, 3, 4), "keep": torch.zeros(3, 4, dtype=torch.bool), **changed}
    with pytest.raises(error) as told:
        top_mass(given["score"], given["keep"], 0.5, given.get("least", 0.0))
    assert words in str(told.value)
