"""Heads that choose, corrections, and the two operations behind them, against slow restatements."""

from __future__ import annotations

import itertools
import math
from typing import Any

import odd_video
import pytest
import tiny
import torch
from restate import (
    band,
    block_of,
    boxes,
    cut,
    expect_groups,
    fill,
    made,
    means,
    on_grid,
    patterns,
    spelled,
    tensors,
    top_p,
    weights,
)

import dit_accel
from dit_accel.config import Option
from dit_accel.config.select import NoneSelect
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.pooled import pooled_attention
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import rows
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16}
TILES = {"picture": (1, 4, 4), "video": (2, 4, 4), **SMALL}
LAYOUTS = [
    TokenLayout(grid=(1, 13, 11), text=5),
    TokenLayout(grid=(5, 6, 7), text=3, text_first=False),
    TokenLayout(grid=(6, 4, 8)),
]
SAMPLES = [(b, h) for b in range(2) for h in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_svg1(layout: TokenLayout) -> None:
    """Each head takes the band, in frame-major or position-major order, that errs less on sampled exact rows."""
    _, plan, q, k, v = made(resolve("svg1", density=0.4, **SMALL), layout, heads=3, structured=True)
    options = [spelled(layout, *pattern) for pattern in patterns(layout, grid_share(layout, 0.4))]
    sampled = rows.sample(layout, 64, torch.device("cpu"))
    mask, taken = plan.to_mask(), set()
    for b, h in SAMPLES:
        exact = weights(q[b, sampled, h], k[b, :, h])
        errors = []
        for option in options:
            kept = exact * option[sampled]
            out = kept @ v[b, :, h].double() / kept.sum(-1, keepdim=True)
            errors.append(float((out - exact @ v[b, :, h].double()).square().mean()))
        best = errors.index(min(errors))
        taken.add(best)
        assert torch.equal(mask[b, h], options[best])
    print("taken", taken)


def test_svg1_finds_the_axis_a_head_looks_along() -> None:
    """A head that looks along time takes the temporal pattern, one that looks within frames the spatial one."""
    layout = TokenLayout(grid=(8, 6, 8))
    g = torch.Generator().manual_seed(2)
    frame, place = torch.randn(8, 16, generator=g), torch.randn(48, 16, generator=g)
    spatial, temporal = frame.repeat_interleave(48, 0), place.repeat(8, 1)
    q = torch.stack([3 * spatial, 3 * temporal], 1)[None]
    v = torch.randn(1, 384, 2, 16, generator=g)
    _, plan = dit_accel.attention(
        q, q, v, layout=layout, recipe=resolve("svg1", density=0.3, **SMALL), return_plan=True
    )
    options = [spelled(layout, *pattern) for pattern in patterns(layout, 0.3)]
    for h in range(2):
        assert torch.equal(plan.to_mask()[0, h], options[h])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("price", "limit"), [(0.5, 1.0), (0.5, 0.05), (0.0, 5.0), (3.0, 5.0)])
@pytest.mark.parametrize("faithful", [False, True])
def test_sparse_vdit(layout: TokenLayout, price: float, limit: float, faithful: bool) -> None:
    """Five patterns: everything, nothing, two bands, columns; least error + price x density, or else everything.

    Text is computed in all of them, in the paper not where nothing is.
    """
    base = resolve("sparse-vdit", faithful=faithful, **SMALL)
    assert base.heads is not None
    recipe = base.override(heads=base.heads.model_copy(update={"price": price, "limit": limit}).model_dump())
    _, plan, q, k, v = made(recipe, layout, heads=3, structured=True)
    share = grid_share(layout, 0.3)
    raster = cut(on_grid(layout), 16)
    n = len(raster)
    wanted = min(max(round(share * n), 1), n)
    columns = {(r, (i * n + n // 2) // wanted) for r in range(n) for i in range(wanted)}
    full = torch.ones(layout.length, layout.length, dtype=torch.bool)
    options = [
        full,
        spelled(layout, raster, set()) if not faithful else torch.zeros_like(full),
        *(spelled(layout, *pattern) for pattern in patterns(layout, share)),
    ]
    options.append(spelled(layout, raster, columns))
    sampled = rows.sample(layout, 64, torch.device("cpu"))
    mask = plan.to_mask()
    for b, h in SAMPLES:
        exact = weights(q[b, sampled, h], k[b, :, h])
        whole = exact @ v[b, :, h].double()
        losses = []
        for option in options:
            kept = exact * option[sampled]
            out = kept @ v[b, :, h].double() / kept.sum(-1, keepdim=True).clamp(min=1e-30)
            losses.append(float((out - whole).square().sum() / whole.square().sum()))
        costs = [loss + price * float(option.float().mean()) for loss, option in zip(losses, options, strict=True)]
        best = costs.index(min(costs)) if min(losses) <= limit else 0
        assert torch.equal(mask[b, h], options[best]), (losses, costs)


def test_heads_of_a_batch_choose_for_themselves() -> None:
    layout = LAYOUTS[1]
    recipe = resolve("sparse-vdit", density=0.3, **SMALL)
    _, plan, q, k, v = made(recipe, layout, heads=3, structured=True)
    _, alone = dit_accel.attention(q[1:], k[1:], v[1:], layout=layout, recipe=recipe, return_plan=True)
    assert torch.equal(plan.to_mask()[1:], alone.to_mask())


def test_nothing_is_computed_without_text_and_costs_nothing() -> None:
    layout = LAYOUTS[2]
    base = resolve("sparse-vdit", **SMALL)
    assert base.heads is not None
    only = base.heads.model_copy(update={"options": (Option(select=NoneSelect()),), "limit": None})
    out, plan, *_ = made(base.override(heads=only.model_dump()), layout)
    assert float(plan.density()) == 0
    assert not out.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_heads_that_cannot_tell_compute_everything(bad: float) -> None:
    layout = LAYOUTS[2]
    q, k, v = (torch.randn(1, layout.length, 2, 16) for _ in range(3))
    k[0, 5, 0, 3] = bad
    recipe = resolve("svg1", density=0.3, **SMALL)
    _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)
    assert plan.to_mask()[0, 0].all()
    assert not plan.to_mask()[0, 1].all()


# Corrections -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_svg_ear_centroids(layout: TokenLayout) -> None:
    """Pairs that are skipped weigh in by their cluster's mean key and value, ln(tokens) on the logit."""
    recipe = resolve("svg-ear", p=0.5, queries=4, keys=7, first=3, **SMALL)
    out, plan, q, k, v = made(recipe, layout, structured=True)
    mask = plan.to_mask()
    for b in range(2):
        for h in range(b, 2):
            x = k[b, on_grid(layout), h][None, None]
            count = min(7, max(x.shape[2] // 16, 1))
            labels = kmeans(x, count, 3)[0][0, 0]
            grid = torch.tensor(on_grid(layout))
            groups = [grid[labels == c] for c in range(count)]
            for i in range(layout.length):
                seen = mask[b, h, i]
                logits = [(q[b, i, h] @ k[b, seen, h].T / 4).double()]
                values = [v[b, seen, h].double()]
                for group in groups:
                    if len(group) and not seen[group].all():
                        assert not seen[group].any()
                        mean = (q[b, i, h] @ k[b, group, h].mean(0) / 4).double() + math.log(len(group))
                        logits.append(mean[None])
                        values.append(v[b, group, h].mean(0)[None].double())
                gold = torch.cat(logits).softmax(0) @ torch.cat(values)
                torch.testing.assert_close(out[b, i, h].double(), gold, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS, odd_video.LAYOUT], ids=str)
def test_svg_ear_spends_its_budget_where_means_err_most(layout: TokenLayout) -> None:
    """Per query cluster: the tokens that top-p would take, given to clusters by error per token, largest first."""
    block = {"block_q": block_of(layout), "block_k": block_of(layout)}
    recipe = resolve("svg-ear", p=0.6, least=0.2, queries=4, keys=7, first=3, **block)
    _, plan, q, k, v = made(recipe, layout, structured=True)
    grid = torch.tensor(on_grid(layout))
    sides = (min(4, max(len(grid) // 32, 1)), min(7, max(len(grid) // 16, 1)))
    moved = 0
    for b in range(len(q)):
        for h in range(2):
            groups = []
            for x, count in zip((q, k), sides, strict=True):
                labels = kmeans(x[b, grid, h][None, None], count, 3)[0][0, 0]
                groups.append([grid[labels == c].tolist() for c in range(count)])
            queries, keys = groups
            sizes = [len(group) for group in keys]
            chosen = set()
            for r, mean in enumerate(means(q[b, :, h], queries).double()):
                logits = means(k[b, :, h], keys).double() @ mean / 4
                share = (logits + torch.tensor(sizes).log()).softmax(0)
                budget = sum(sizes[c] for c in top_p(share, 0.6, int(0.2 * len(keys))))
                exps = (k[b, :, h].double() @ mean / 4).exp()
                errors = []
                for c, group in enumerate(keys):
                    exact = (exps[group, None] * v[b, group, h]).sum(0)
                    pooled = len(group) * logits[c].exp() * v[b, group, h].mean(0)
                    errors.append(float((exact - pooled).norm() / exps[grid].sum()) / len(group))
                order = sorted(range(len(keys)), key=lambda c: -errors[c])
                taken = fill(order, sizes, budget) | {order[0]}
                moved += taken != set(sorted(range(len(keys)), key=lambda c: -float(logits[c]))[: len(taken)])
                chosen |= {(r, c) for c in taken}
            expect_groups(plan.to_mask()[b, h], queries, keys, chosen)
    assert moved > 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rectified_pooled_mass(layout: TokenLayout) -> None:
    """The output scaled by what the pooled map says was computed; mean values for units worth it; text exact."""
    recipe = resolve("rectified", p=0.2, least=0.1, adjacent=False, order={"kind": "raster"}, **SMALL)
    corrected, plan, q, k, v = made(recipe, layout, structured=True)
    plain, *_ = made(recipe.override(correct=None), layout, structured=True)
    groups = cut(on_grid(layout), 16)
    text = [t for t in range(layout.length) if t not in set(on_grid(layout))]
    compensated = 0
    for b in range(2):
        for h in range(2):
            mq, mk, mv = (means(x[b, :, h], groups) for x in (q, k, v))
            dq = torch.stack([(q[b, g, h] - m).abs().mean(0) for g, m in zip(groups, mq, strict=True)])
            dk = torch.stack([(k[b, g, h] - m).abs().mean(0) for g, m in zip(groups, mk, strict=True)])
            held = plan.to_mask()[b, h]
            for r, group in enumerate(groups):
                logits = [float(mq[r] @ m) / 4 + math.log(len(g)) for m, g in zip(mk, groups, strict=True)]
                logits += [float(mq[r] @ k[b, t, h]) / 4 for t in text]
                share = torch.tensor(logits).softmax(0)
                kept, rest = 1.0, torch.zeros(16)
                for c, keys in enumerate(groups):
                    gain = abs(float(mq[r] @ mk[c]))
                    cost = abs(float(dq[r] @ mk[c])) + abs(float(mq[r] @ dk[c]))
                    if not held[group[0], keys[0]] and gain > cost:
                        kept -= float(share[c])
                        rest += share[c] * mv[c]
                        compensated += 1
                gold = kept * plain[b, group, h] + rest
                torch.testing.assert_close(corrected[b, group, h], gold, rtol=1e-4, atol=1e-5)
            assert torch.equal(corrected[b, text, h], plain[b, text, h])
    assert compensated > 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stride", [4, 16])
def test_delta(layout: TokenLayout, stride: int) -> None:
    """One query in `stride` computed in full; its neighbours in the order move by the same difference."""
    recipe = resolve("delta", density=0.3, stride=stride, **SMALL)
    out, _, q, k, v = made(recipe, layout, structured=True)
    plain, *_ = made(recipe.override(correct=None), layout, structured=True)
    for b in range(2):
        for h in range(2):
            exact = weights(q[b, :, h], k[b, :, h]) @ v[b, :, h].double()
            for run in cut(on_grid(layout), 16):
                for group in cut(run, stride):
                    gold = plain[b, group, h].double() + exact[group[0]] - plain[b, group[0], h].double()
                    torch.testing.assert_close(out[b, group, h].double(), gold, rtol=1e-4, atol=1e-5)


CORRECTED: dict[str, dict[str, Any]] = {
    "svg-ear": {"density": 0.3, "queries": 8, "keys": 16},
    "rectified": {"density": 0.3},
    "delta": {"density": 0.3},
    "rettention": {"density": 0.3},
    "hilbert-ear": {"density": 0.3, "block_q": 32, "key_run": 16},
    **{name: {"adaptive": False, "block_q": 32, "key_run": 16} for name in ("quality", "balanced", "fast")},
}


def test_every_correction_is_held_against_none() -> None:
    known = [name for name, recipe in dit_accel.recipes().items() if recipe.correct is not None]
    assert sorted(CORRECTED) == sorted(known)


@pytest.mark.parametrize("name", CORRECTED)
def test_a_correction_errs_less_than_none(name: str) -> None:
    """On the same pairs, at the second of two steps between which the tokens move a little."""
    layout = TokenLayout(grid=(4, 8, 12), text=5)
    recipe = resolve(name, **{**SMALL, **CORRECTED[name]})
    first, moved = (tensors(layout, seed, structured=True) for seed in (0, 1))
    second = [0.95 * x + 0.05 * y for x, y in zip(first, moved, strict=True)]
    outs, masks = [], []
    for one in (recipe, recipe.override(correct=None)):
        state = dit_accel.AttentionState()
        dit_accel.attention(*first, layout=layout, recipe=one, state=state)
        out, plan = dit_accel.attention(*second, layout=layout, recipe=one, state=state, return_plan=True)
        assert not plan.measures
        outs.append(out)
        masks.append(plan.to_mask())
    assert torch.equal(*torch.broadcast_tensors(*masks))
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in second)).transpose(1, 2)
    errors = [float((out - exact).square().mean()) for out in outs]
    print(name, errors)
    assert errors[0] < 0.9 * errors[1]


# The two operations ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_kmeans_against_a_slow_restatement(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n, count, steps = int(torch.randint(5, 60, (1,), generator=g)), 1 + seed, 1 + seed % 3
    x = torch.randn(2, 3, 7, n, generator=g).mT
    start = torch.randn(2, 3, count, 7, generator=g) if seed % 2 else None
    labels, centroids, sizes = kmeans(x, count, steps, start)
    print("seed", seed, n, count, steps)
    for b in range(2):
        for h in range(3):
            tokens = x[b, h]
            middle = (
                start[b, h].clone() if start is not None else tokens[[(i * n + n // 2) // count for i in range(count)]]
            )
            label = torch.zeros(n, dtype=torch.int32)
            for _ in range(steps):
                label = torch.cdist(tokens, middle).argmin(-1).int()
                for c in range(count):
                    if (label == c).any():
                        middle[c] = tokens[label == c].mean(0)
            assert torch.equal(labels[b, h], label)
            torch.testing.assert_close(centroids[b, h], middle)
            assert sizes[b, h].tolist() == [int((label == c).sum()) for c in range(count)]


def test_kmeans_never_starts_from_what_is_not_finite() -> None:
    x = torch.randn(1, 1, 30, 4)
    start = torch.full((1, 1, 3, 4), float("nan"))
    assert torch.equal(kmeans(x, 3, 2, start)[0], kmeans(x, 3, 2)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), 2, 1), "expected a non-empty"),
        ((torch.zeros(1, 1, 4, 2), 5, 1), "expected 1 to 4"),
        ((torch.zeros(1, 1, 4, 2), 2, 0), "expected at least 1"),
        ((torch.zeros(1, 1, 4, 2), 2, 1, torch.zeros(1, 1, 3, 2)), "expected [1, 1, 2, 2]"),
    ],
)
def test_kmeans_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        kmeans(*arguments)
    assert message in str(error.value)


def test_pooled_attention_of_equal_tokens_is_attention() -> None:
    """Groups of equal tokens weigh what their tokens would, and a query without a group has no say."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 5, 3, 8, generator=g)
    k, v = (torch.randn(2, 3, 4, 8, generator=g) for _ in range(2))
    tokens = torch.tensor([3.0, 1, 0, 7])[None, None]
    allowed = torch.rand(2, 3, 2, 4, generator=g) < 0.7
    allowed[..., 1, :] = False
    row = torch.tensor([0, 0, 1, 0, 0])[None, None]
    out, lse = pooled_attention(q, k, v, tokens.log(), ~allowed, row, 0.3)
    repeats = tokens[0, 0].long()
    keys, values = (x.repeat_interleave(repeats, 2) for x in (k, v))
    seen = allowed.repeat_interleave(repeats, 3)[:, :, row[0, 0]]
    logits = (q.transpose(1, 2) @ keys.mT * 0.3).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out.transpose(1, 2), logits.softmax(-1).nan_to_num(0) @ values)
    assert (lse[:, :, 2] == -math.inf).all()
    with pytest.raises(ValueError, match="row is"):
        pooled_attention(q, k, v, tokens.log(), ~allowed, row[..., :3], 0.3)


def test_words_are_used() -> None:
    """The words this file shares with others mean what they say."""
    assert boxes(LAYOUTS[0], (1, 4, 4))[0][:3] == [5, 6, 7]
    assert fill([0, 1, 2], [4, 4, 4], 6) == {0, 1}
    expect_groups(torch.eye(2, dtype=torch.bool), [[0], [1]], [[0], [1]], {(0, 0), (1, 1)})
    assert TILES["picture"] == (1, 4, 4)


# A budget over heads -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["duo", "moa"])
@pytest.mark.parametrize("budget", [0.35, 0.6])
def test_a_budget_goes_to_the_heads_that_lose_most(name: str, budget: float) -> None:
    """No other choice of patterns costs as little and loses less: all of them are tried."""
    layout = TokenLayout(grid=(4, 8, 8))
    _, plan, q, k, v = made(resolve(name, density=budget, sinks=0, **SMALL), layout, heads=5, structured=True)
    raster = cut(on_grid(layout), 16)
    shares = {"duo": [0.1, 1.0], "moa": [0.1, 0.2, 0.35, 0.5, 0.75]}[name]
    options = [spelled(layout, raster, band(raster, share)) for share in shares]
    sampled, mask = rows.sample(layout, 64, torch.device("cpu")), plan.to_mask()
    costs = [float(option.float().mean()) for option in options]
    for b in range(2):
        losses = []
        for h in range(5):
            exact = weights(q[b, sampled, h], k[b, :, h])
            whole = exact @ v[b, :, h].double()
            kept = [exact * option[sampled] for option in options]
            outs = [x @ v[b, :, h].double() / x.sum(-1, keepdim=True) for x in kept]
            losses.append([float((out - whole).square().sum() / whole.square().sum()) for out in outs])
        chosen = [next(i for i, option in enumerate(options) if torch.equal(mask[b, h], option)) for h in range(5)]
        spent = sum(costs[i] for i in chosen)
        lost = sum(losses[h][i] for h, i in enumerate(chosen))
        assert abs(spent / 5 - budget) < 0.1
        for other in itertools.product(range(len(options)), repeat=5):
            if sum(costs[i] for i in other) <= spent + 1e-9:
                assert sum(losses[h][i] for h, i in enumerate(other)) >= lost - 1e-6


def test_few_heads_divide_a_budget_roughly_and_say_so() -> None:
    layout = TokenLayout(grid=(4, 8, 8))
    _, plan, *_ = made(resolve("duo", density=0.3, sinks=0, **SMALL), layout, heads=2)
    assert "2 heads with patterns of" in plan.note


# The residual of the last full step --------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rettention(layout: TokenLayout) -> None:
    """Full steps keep share and rest; between them out = share x sparse + rest, the share growing step by step."""
    recipe = resolve("rettention", density=0.3, **SMALL).override(
        correct={"kind": "residual", "every": 3, "growth": 0.1}
    )
    state, g = dit_accel.AttentionState(), torch.Generator().manual_seed(4)
    share = rest = torch.empty(0)
    for step in range(5):
        q, k, v = (torch.randn(2, layout.length, 2, 16, generator=g) for _ in range(3))
        out, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, state=state, return_plan=True)
        logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
        sums = logits.exp()
        mask = plan.to_mask()
        dense = (sums / sums.sum(-1, keepdim=True)) @ v.transpose(1, 2).double()
        sparse = (sums * mask / (sums * mask).sum(-1, keepdim=True)) @ v.transpose(1, 2).double()
        if step % 3 == 0:
            share = ((sums * mask).sum(-1) / sums.sum(-1))[..., None]
            rest = dense - share * sparse
            gold = dense
            assert plan.measures
            assert float(plan.density()) == 1
        else:
            share = share + 0.1
            gold = share * sparse + rest
            assert float(plan.density()) < 0.5
        torch.testing.assert_close(out.transpose(1, 2).double(), gold, rtol=1e-4, atol=1e-5)


def test_full_steps_are_in_the_report_with_their_reason() -> None:
    pipe, call = tiny.flux()
    recipe = resolve("rettention", density=0.3, dense_steps=0, **SMALL)
    with dit_accel.accelerate(pipe, recipe) as handle:
        tiny.generate(pipe, call, steps=7)
        report = handle.report()
    full = [row for row in report.rows if row.reason == "a full step measures what is missing"]
    assert {row.steps for row in full} == {"0, 5"}
    assert report.density < 0.5 < report.overall_density
    assert report.state_bytes > 0
