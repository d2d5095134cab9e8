"""Orders, scores, selectors and keeps in three dimensions, on an odd grid, against slow restatements of each rule.

The restatements, in `odd_video.py`, cut, score and choose units in plain Python; what they choose is spelled out token
by token and compared with the exact mask of the plan that the front door returns.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from odd_video import ORDERS, Cell, geometry, planned, restated, scored, spelled_out, units_of

import dit_accel
from dit_accel.layout import Grid, Text, TokenLayout
from dit_accel.sparsity.recipes import resolve


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", ["window", "cross"])
@pytest.mark.parametrize(
    "select",
    [
        {"kind": "within", "radius": 0},
        {"kind": "within", "radius": 1},
        {"kind": "top-k", "density": 0.3},
        {"kind": "percentile", "density": 0.2},
    ],
    ids=str,
)
def test_geometry(order: str, shape: str, select: dict[str, Any]) -> None:
    units = units_of(order)
    score = {"kind": "geometry", "shape": shape}
    plan, *_ = planned({"order": ORDERS[order][0], "score": score, "select": select}, heads=1)
    chosen = restated(select, geometry(order, units, shape), [len(unit) for unit in units])
    assert torch.equal(plan.to_mask()[0, 0], spelled_out(chosen, units))


POOLED = {"kind": "pooled"}
TOP_K = {"kind": "top-k", "density": 0.3}
CHOICES = [  # every order with one rule, then every score and every rule over scores
    *((order, POOLED, TOP_K) for order in ORDERS),
    ("hilbert", POOLED, {"kind": "percentile", "density": 0.25}),
    ("hilbert", POOLED, {"kind": "top-p", "p": 0.6}),
    ("wfh", POOLED, {"kind": "top-p", "p": 0.2, "least": 0.4}),
    ("tile", POOLED, {"kind": "cumulative", "p": 0.5}),
    ("tile", {"kind": "subtiles", "tokens": 16}, TOP_K),
    ("hwf whole", {"kind": "subtiles", "tokens": 8}, {"kind": "cumulative", "p": 0.4}),
    ("hilbert", {"kind": "antidiagonal", "stride": 16}, {"kind": "top-p", "p": 0.5}),
    ("raster", {"kind": "antidiagonal", "stride": 8}, {"kind": "percentile", "density": 0.3}),
    ("frame tile", {"kind": "mass"}, {"kind": "top-p", "p": 0.5}),
]


@pytest.mark.parametrize(("order", "score", "select"), CHOICES, ids=str)
def test_scores_and_the_attention_on_them(order: str, score: dict[str, Any], select: dict[str, Any]) -> None:
    units = units_of(order)
    plan, q, k, v, out = planned({"order": ORDERS[order][0], "score": score, "select": select})
    mask = plan.to_mask()
    for b, h in ((0, 0), (1, 1)):
        chosen = restated(select, scored(score, units, q[b, :, h], k[b, :, h]), [len(unit) for unit in units])
        assert torch.equal(mask[b, h], spelled_out(chosen, units)), (b, h)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(8)
    gold = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~mask, -math.inf).softmax(-1), v.double())
    torch.testing.assert_close(out.double(), gold, rtol=1e-5, atol=1e-5)


def meets(name: str, a: list[Cell], b: list[Cell]) -> bool:
    """Say whether a keep joins a query unit and a key unit: do any two of their tokens belong together?"""
    if name == "first_frame":
        return any(cell[0] == 0 for cell in b)
    if name == "own_frame":
        return bool({cell[0] for cell in a} & {cell[0] for cell in b})
    return bool({cell[1:] for cell in a} & {cell[1:] for cell in b})


# in the other orders each unit holds tokens of all frames, so these keeps would keep everything
@pytest.mark.parametrize("order", ["raster", "hilbert", "tile", "frame tile", "fhw whole"])
@pytest.mark.parametrize("names", [("first_frame",), ("own_frame",), ("own_place",), ("first_frame", "own_place")])
def test_frame_keeps(order: str, names: tuple[str, ...]) -> None:
    """At the smallest density nothing but the keeps is left."""
    units = units_of(order)
    keeps = {"own": False, **dict.fromkeys(names, True)}
    plan, *_ = planned(
        {
            "order": ORDERS[order][0],
            "score": {"kind": "geometry"},
            "select": {"kind": "top-k", "density": 1e-6},
            "keeps": keeps,
        },
        heads=1,
    )
    kept = np.array([[any(meets(name, a, b) for name in names) for b in units] for a in units])
    assert 0 < kept.mean() < 1
    assert torch.equal(plan.to_mask()[0, 0], spelled_out(kept, units))
    assert f"the least here is {float(plan.density()):.2f}" in plan.note


@pytest.mark.parametrize("name", ["first_frame", "own_frame", "own_place"])
def test_pictures_have_no_frames_to_keep(name: str) -> None:
    layout = TokenLayout(grid=(1, 32, 32), text=5)
    q, k, v = (torch.randn(1, layout.length, 1, 16) for _ in range(3))
    recipe = resolve("draft", density=0.3, picture=(1, 4, 4), block_q=16, block_k=16)
    masks = []
    for settled in (recipe, recipe.override(**{name: True})):
        _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=settled, return_plan=True)
        masks.append(plan.to_mask())
    assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["first_frame", "own_frame", "own_place"])
def test_keeps_leave_references_alone(name: str) -> None:
    """What a conditioning picture shows is no frame of the video, wherever it lies in the sequence."""
    layout = TokenLayout([Grid(1, 8, 8, role="reference"), Text(3), Grid(3, 8, 8)])
    keeps = {"own": False, name: True}
    recipe = {"order": {"kind": "raster"}, "select": {"kind": "top-k", "density": 1e-6}, "keeps": keeps}
    settled = resolve({"name": "kept", "block_q": 16, "block_k": 16, **recipe})
    q, k, v = (torch.randn(1, layout.length, 1, 16) for _ in range(3))
    _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=settled, return_plan=True)
    mask = plan.to_mask()[0, 0]
    video = mask[67:, 67:].reshape(3, 8, 8, 3, 8, 8)
    itself = 0 if name == "first_frame" else 64 * 16  # a row without keeps has its best unit: here its own
    assert int(mask[:64, :64].sum()) == itself
    for f, g in itertools.product(range(3), repeat=2):
        rows = {"first_frame": g == 0, "own_frame": f == g, "own_place": None}[name]
        if rows is not None:
            assert bool(video[f, :, :, g].all()) == bool(video[f, :, :, g].any()) == rows
    if name == "own_place":
        assert video.diagonal(dim1=1, dim2=4).diagonal(dim1=1, dim2=3).all()
