"""Recipes that choose by content, against slow restatements of their papers' rules."""

from __future__ import annotations

import itertools
import math

import odd_video
import pytest
import torch
from restate import (
    block_of,
    boxes,
    by_axes,
    cell,
    coclusters,
    cut,
    expect_groups,
    fill,
    made,
    means,
    on_grid,
    samples,
    top_p,
    weights,
)

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import curves, rows
from dit_accel.sparsity.decide import grid_share
from dit_accel.sparsity.recipes import resolve

SMALL = {"block_q": 16, "block_k": 16}
LAYOUTS = [
    TokenLayout(grid=(1, 13, 11), text=5),
    TokenLayout(grid=(5, 6, 7), text=3, text_first=False),
    TokenLayout(grid=(2, 8, 8)),
]
SAMPLES = [(b, h) for b in range(2) for h in range(2)]
ODD = odd_video.LAYOUT


def blocks(layout: TokenLayout) -> dict[str, int]:
    return {"block_q": block_of(layout), "block_k": block_of(layout)}


def along(layout: TokenLayout, curve: str) -> list[int]:
    """List the grid's tokens along a curve."""
    path = {"raster": lambda g: range(math.prod(g)), "hilbert": curves.hilbert, "gilbert": curves.gilbert}[curve]
    first = on_grid(layout)[0]
    return [first + int(t) for t in path(layout.main.shape)]


def touching(layout: TokenLayout, groups: list[list[int]]) -> set[tuple[int, int]]:
    """List the pairs of groups of which some tokens are neighbours on the grid, diagonals too."""
    owner = {cell(layout, token): number for number, group in enumerate(groups) for token in group}
    shifts = list(itertools.product((-1, 0, 1), repeat=3))
    beside = [(r, (f + i, h + j, w + k)) for (f, h, w), r in owner.items() for i, j, k in shifts]
    return {(r, owner[place]) for r, place in beside if place in owner}


def stable(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda c: -float(row[c]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("p", "stride"), [(0.5, 4), (0.9, 8)])
def test_xattention(layout: TokenLayout, p: float, stride: int) -> None:
    """Sums along antidiagonals of small squares; softmax; summed to blocks; top-p of each row."""
    recipe = resolve("xattention", p=p, stride=stride, **SMALL)
    _, plan, q, k, _ = made(recipe, layout, structured=True)
    groups = cut(along(layout, "raster"), 16)
    runs = [run for group in groups for run in cut(group, stride)]
    owner = [g for g, group in enumerate(groups) for _ in cut(group, stride)]
    for b, h in SAMPLES:

        def whole(x: torch.Tensor, run: list[int]) -> torch.Tensor:
            own = x[run]
            return torch.cat([own, own.mean(0).expand(stride - len(run), -1)])

        logits = torch.empty(len(runs), len(runs))
        for i, queries in enumerate(runs):
            for j, keys in enumerate(runs):
                square = whole(q[b, :, h], queries) @ whole(k[b, :, h], keys).T
                total = sum(square[stride - 1 - s, s] for s in range(stride))
                logits[i, j] = total / (math.sqrt(16) * stride) + math.log(len(keys))
        share = logits.softmax(-1)
        score = torch.zeros(len(groups), len(groups))
        for i in range(len(runs)):
            for j in range(len(runs)):
                score[owner[i], owner[j]] += share[i, j] * len(runs[i])
        chosen = {(r, c) for r in range(len(groups)) for c in top_p(score[r], p) | {r}}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("trust", [-0.1, 0.5, 0.7])
def test_sparge(layout: TokenLayout, trust: float) -> None:
    """Keys less their mean; units whose tokens point apart are computed in full; top-k of the others."""
    _, plan, q, k, _ = made(resolve("sparge", density=0.4, trust=trust, **SMALL), layout, structured=True)
    groups = cut(along(layout, "hilbert"), 16)
    sizes = [len(g) for g in groups]
    budget = grid_share(layout, 0.4) * sum(sizes)
    seen = set()
    for b, h in SAMPLES:
        keys = k[b, :, h] - k[b, on_grid(layout), h].mean(0)

        def alike(x: torch.Tensor, group: list[int]) -> float:
            unit = x[group] / x[group].norm(dim=-1, keepdim=True)
            return float((unit @ unit.T).mean())

        apart_q = {g for g, group in enumerate(groups) if alike(q[b, :, h], group) < trust}
        apart_k = {g for g, group in enumerate(groups) if alike(keys, group) < trust}
        seen |= {len(apart_k)}
        logits = means(q[b, :, h], groups) @ means(keys, groups).T / 4
        logits[:, sorted(apart_k)] = -math.inf
        score = logits.softmax(-1)
        chosen = set()
        for r in range(len(groups)):
            order = sorted(range(len(groups)), key=lambda c: (c not in apart_k and c != r, -float(score[r, c])))
            taken = fill(order, sizes, budget) | apart_k | {r}
            chosen |= {(r, c) for c in (range(len(groups)) if r in apart_q else taken)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)
    assert (seen != {0}) == (trust > 0)


def errors_per_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[list[int]], keys: list[list[int]], grid: list[int]
) -> torch.Tensor:
    """Return how far each unit of keys errs by its means for the mean query of each unit, per token of the key unit."""
    errors = torch.zeros(len(queries), len(keys), dtype=torch.float64)
    for r, group in enumerate(queries):
        exps = (k.double() @ q[group].double().mean(0) / 4).exp()
        for c, unit in enumerate(keys):
            pooled = len(unit) * (k[unit].double().mean(0) @ q[group].double().mean(0) / 4).exp()
            missed = exps[unit] @ v[unit].double() - pooled * v[unit].double().mean(0)
            errors[r, c] = missed.norm() / exps[grid].sum() / len(unit)
    return errors


@pytest.mark.parametrize(("density", "least"), [(0.5, 0.3), (0.35, 0.0), (0.35, 0.1)])
@pytest.mark.parametrize("layout", [*LAYOUTS, ODD], ids=str)
def test_a_density_goes_to_the_worst_errors_of_a_head(layout: TokenLayout, density: float, least: float) -> None:
    """Own units and each row's worst first, then the pairs of most error per token of the head, until it is full."""
    parts = 4 if block_of(layout) == 64 else 2
    block = {"block_q": 16 * parts, "block_k": 16 * parts}
    recipe = resolve("hilbert-ear", density=density, key_run=16, least=least, **block)
    _, plan, q, k, v = made(recipe, layout, structured=True)
    queries, keys = (cut(along(layout, "hilbert"), n) for n in (16 * parts, 16))
    pairs, uneven = list(itertools.product(range(len(queries)), range(len(keys)))), 0
    sizes = [len(queries[r]) * len(keys[c]) for r, c in pairs]
    lengths = [len(key) for key in keys]
    for b, h in samples(layout):
        errors = errors_per_token(q[b, :, h], k[b, :, h], v[b, :, h], queries, keys, on_grid(layout))
        share = grid_share(layout, density)
        first = {(r, c) for r, c in pairs if c // parts == r}
        for r, row in enumerate(errors):
            worst = stable(row)
            first |= {(r, c) for c in fill(worst, lengths, min(least, share / 2) * sum(lengths)) | {worst[0]}}
        order = sorted(range(len(pairs)), key=lambda i: (pairs[i] not in first, -float(errors[pairs[i]])))
        chosen = {pairs[i] for i in fill(order, sizes, share * sum(sizes))} | first
        uneven += len({sum(r == row for r, _ in chosen) for row in range(len(queries))}) > 1
        expect_groups(plan.to_mask()[b, h], queries, keys, chosen)
    assert uneven


@pytest.mark.parametrize("p", [0.3, 0.5])
@pytest.mark.parametrize("layout", [*LAYOUTS, ODD], ids=str)
def test_hilbert_ear(layout: TokenLayout, p: float) -> None:
    """Runs of a curve, those of keys shorter; most error per token first; means stand for the others."""
    parts = 4 if block_of(layout) == 64 else 2
    recipe = resolve("hilbert-ear", p=p, key_run=16, least=0.0, block_q=16 * parts, block_k=16 * parts)
    out, plan, q, k, v = made(recipe, layout, structured=True)
    queries, keys = (cut(along(layout, "hilbert"), n) for n in (16 * parts, 16))
    sizes = [len(group) for group in keys]
    moved, stands = 0, 0
    for b, h in samples(layout):
        chosen = set()
        mean_k, mean_v = means(k[b, :, h], keys).double(), means(v[b, :, h], keys).double()
        errors = errors_per_token(q[b, :, h], k[b, :, h], v[b, :, h], queries, keys, on_grid(layout))
        for r, group in enumerate(queries):
            logits = mean_k @ q[b, group, h].double().mean(0) / 4
            own = set(range(parts * r, min(parts * (r + 1), len(keys))))
            order = sorted(range(len(keys)), key=lambda c: (c not in own, -float(errors[r, c])))
            worth = logits + torch.tensor(sizes).log()
            as_top_p = top_p(worth.softmax(0), p) | own
            taken = fill(order, sizes, sum(sizes[c] for c in as_top_p)) | own
            moved += taken != as_top_p
            chosen |= {(r, c) for c in taken}
        mask = plan.to_mask()[b, h]
        expect_groups(mask, queries, keys, chosen)
        for i in range(0, layout.length, 7):
            seen = mask[i]
            skipped = [c for c, unit in enumerate(keys) if not seen[unit].any()]
            stands += len(skipped)
            scores = [k[b, seen, h].double() @ q[b, i, h].double() / 4]
            scores += [(mean_k[c] @ q[b, i, h].double() / 4 + math.log(sizes[c]))[None] for c in skipped]
            values = torch.cat([v[b, seen, h].double(), mean_v[skipped]])
            gold = torch.cat(scores).softmax(0) @ values
            torch.testing.assert_close(out[b, i, h].double(), gold, rtol=1e-4, atol=1e-5)
    assert moved > 0
    assert stands > 0


@pytest.mark.parametrize(("layout", "segment"), [*itertools.product(LAYOUTS, [0, 48, 60]), (ODD, 500)], ids=str)
def test_pbs(layout: TokenLayout, segment: int) -> None:
    """Keys sorted by the attention of sampled queries inside segments of a curve; pooled; top-p."""
    _, plan, q, k, _ = made(resolve("pbs", p=0.6, segment=segment, rows=20, **blocks(layout)), layout, structured=True)
    line = along(layout, "gilbert")
    block = block_of(layout)
    queries = cut(line, block)
    sampled = rows.sample(layout, 20, torch.device("cpu")).tolist()
    for b, h in samples(layout):
        mass = weights(q[b, sampled, h], k[b, :, h]).mean(0)
        keys = []
        for part in cut(line, segment or len(line)):
            keys += cut(sorted(part, key=lambda t: -float(mass[t])), block)
        score = (means(q[b, :, h], queries) @ means(k[b, :, h], keys).T / 4).softmax(-1)
        chosen = {(r, c) for r in range(len(queries)) for c in top_p(score[r], 0.6)}
        expect_groups(plan.to_mask()[b, h], queries, keys, chosen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("p", "least"), [(0.3, 0.25), (0.6, 0.5)])
def test_jenga(layout: TokenLayout, p: float, least: float) -> None:
    """Top-p of the pooled softmax, at least a share of the blocks, and the blocks that touch one's own."""
    _, plan, q, k, _ = made(resolve("jenga", p=p, least=least, **SMALL), layout, structured=True)
    groups = cut(along(layout, "gilbert"), 16)
    count = int(least * len(groups))

    near = touching(layout, groups)
    for b, h in SAMPLES:
        score = (means(q[b, :, h], groups) @ means(k[b, :, h], groups).T / 4).softmax(-1)
        chosen = {(r, c) for r in range(len(groups)) for c in top_p(score[r], p, count)} | near
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


@pytest.mark.parametrize("layout", [*LAYOUTS, ODD], ids=str)
@pytest.mark.parametrize(("p", "least"), [(0.3, 0.2), (0.6, 0.4)])
def test_rectified_selection(layout: TokenLayout, p: float, least: float) -> None:
    """Top-p of the softmax of means that counts tokens, at least a share of the blocks, and those that touch."""
    _, plan, q, k, _ = made(resolve("rectified", p=p, least=least, **blocks(layout)), layout, structured=True)
    groups = cut(along(layout, "gilbert"), block_of(layout))
    tokens = torch.tensor([float(len(group)) for group in groups])
    count, near = int(least * len(groups)), touching(layout, groups)
    pairs = list(itertools.product(range(len(groups)), repeat=2))
    for b, h in samples(layout):
        exps = (means(q[b, :, h], groups) @ means(k[b, :, h], groups).T / 4).double().exp() * tokens
        score = exps / exps.sum(-1, keepdim=True)
        by_score = {(r, c) for r in range(len(groups)) for c in top_p(score[r], p, count)}
        assert near - by_score
        assert by_score - near
        assert set(pairs) - by_score - near
        expect_groups(plan.to_mask()[b, h], groups, groups, by_score | near)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dfs(layout: TokenLayout) -> None:
    """Means of few tokens along a Hilbert curve; softmax; summed to blocks; top-k of each row."""
    _, plan, q, k, _ = made(resolve("dfs", density=0.4, tokens=4, every=1, **SMALL), layout, structured=True)
    groups = cut(along(layout, "hilbert"), 16)
    pieces = [piece for group in groups for piece in cut(group, 4)]
    owner = [g for g, group in enumerate(groups) for _ in cut(group, 4)]
    sizes = [len(g) for g in groups]
    for b, h in SAMPLES:
        logits = means(q[b, :, h], pieces) @ means(k[b, :, h], pieces).T / 4
        share = (logits + torch.tensor([len(p) for p in pieces]).log()).softmax(-1)
        score = torch.zeros(len(groups), len(groups))
        for i in range(len(pieces)):
            for j in range(len(pieces)):
                score[owner[i], owner[j]] += share[i, j] * len(pieces[i])
        chosen = set()
        for r in range(len(groups)):
            order = [r, *(c for c in stable(score[r]) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, grid_share(layout, 0.4) * sum(sizes))} | {(r, r)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(ODD, marks=pytest.mark.full)], ids=str)
def test_adaspa(layout: TokenLayout) -> None:
    """Exact block sums of attention; top-k of each row; heads that keep over 0.8 get half, the worst as much more."""
    recipe = resolve("adaspa", density=0.4, **blocks(layout))
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, layout.length, 4, 16, generator=g) for _ in range(3))
    sharp = torch.eye(16)[torch.arange(layout.length) // block_of(layout) % 16] + 0.1 * q[0, :, 1]
    q[0, :, 0], k[0, :, 0] = 9 * sharp, 9 * sharp  # two heads that look at few blocks only
    q[0, :, 2], k[0, :, 2] = 7 * sharp, 7 * sharp
    _, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)
    groups = cut(along(layout, "raster"), block_of(layout))
    sizes = [len(x) for x in groups]
    share = grid_share(layout, 0.4)
    score = torch.zeros(4, len(groups), len(groups), dtype=torch.float64)
    for h in range(4):
        exact = weights(q[0, :, h], k[0, :, h])
        for r, queries in enumerate(groups):
            for c, keys in enumerate(groups):
                score[h, r, c] = exact[torch.tensor(queries)[:, None], torch.tensor(keys)[None]].sum(-1).mean()

    def select(h: int, portion: float) -> set[tuple[int, int]]:
        chosen = set()
        for r in range(len(groups)):
            order = [r, *(c for c in stable(score[h, r]) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, portion * sum(sizes))} | {(r, r)}
        return chosen

    recall = [sum(float(score[h, r, c]) for r, c in select(h, share)) / float(score[h].sum()) for h in range(4)]
    ranked = sorted(range(4), key=lambda h: -recall[h])
    moved = min(sum(x > 0.8 for x in recall), 2)
    assert moved > 0
    change = min(share / 2, 1 - share)
    for place, h in enumerate(ranked):
        portion = share - change if place < moved else share + change if place >= 4 - moved else share
        expect_groups(plan.to_mask()[0, h], groups, groups, select(h, portion))


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("p", [0.25, 0.6])
def test_vmoba(layout: TokenLayout, p: float) -> None:
    """Bare products with mean keys, moved to 0..1 in each row; the head's best pairs until p of all is reached."""
    tile = (1, 4, 4) if layout.main.frames == 1 else (2, 4, 4)
    recipe = resolve("vmoba", p=p, picture=(1, 4, 4), video=(2, 4, 4), cases=(), **SMALL)
    _, plan, q, k, _ = made(recipe, layout)
    groups = boxes(layout, tile)
    for b, h in SAMPLES:
        score = means(q[b, :, h], groups) @ means(k[b, :, h], groups).T
        score = (score - score.amin(-1, keepdim=True)) / (score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True))
        n = len(groups)
        chosen = {divmod(i, n) for i in top_p(score.flatten(), p)}
        chosen |= {(r, r) for r in range(n)} | {(r, stable(score[r])[0]) for r in range(n)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


def test_vmoba_turns_from_layer_to_layer() -> None:
    recipe = resolve("vmoba")
    kinds = [recipe.at(site, 7, 0.5).order.brief for site in range(7)]
    assert kinds[0] == kinds[3] == kinds[6] == "axes fhw whole"
    assert kinds[1] == kinds[4] != kinds[2] == kinds[5]


def clusters(x: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """Cluster [tokens, D] slowly from evenly spaced tokens; return the labels."""
    n = len(x)
    centroids = [x[(i * n + n // 2) // count] for i in range(count)]
    labels: list[int] = []
    for _ in range(iterations):
        labels = [int((token - torch.stack(centroids)).square().sum(-1).argmin()) for token in x]
        for c in range(count):
            members = [i for i, label in enumerate(labels) if label == c]
            centroids[c] = x[members].mean(0) if members else centroids[c]
    return torch.tensor(labels)


@pytest.mark.parametrize(
    ("layout", "p", "least"),
    [*((layout, *rest) for layout in LAYOUTS for rest in ((0.5, 0.1), (0.8, 0.5))), (ODD, 0.5, 0.1)],
    ids=str,
)
@pytest.mark.parametrize("name", ["svg2", "svoo"])
def test_clusters(name: str, layout: TokenLayout, p: float, least: float) -> None:
    """Clusters of queries and of keys, found apart or together; a softmax of centroids that counts keys; top-p."""
    asked = (9, 24) if layout is ODD else (4, 7)
    recipe = resolve(name, p=p, least=least, queries=asked[0], keys=asked[1], first=3, **blocks(layout))
    _, plan, q, k, _ = made(recipe, layout, structured=True)
    grid = torch.tensor(on_grid(layout))
    sides = (min(asked[0], max(len(grid) // 32, 1)), min(asked[1], max(len(grid) // 16, 1)))
    for b, h in samples(layout):
        if name == "svoo":
            found = coclusters(q[b, grid, h], k[b, grid, h], sides, 3)
        else:
            found = [clusters(x[b, grid, h], count, 3) for x, count in zip((q, k), sides, strict=True)]
        queries, keys = (
            [grid[labels == c].tolist() for c in range(count)] for labels, count in zip(found, sides, strict=True)
        )
        logits = means(q[b, :, h], queries) @ means(k[b, :, h], keys).T / 4
        score = (logits + torch.tensor([float(len(group)) for group in keys]).log()).softmax(-1)
        floor = int(least * len(keys))
        chosen = {(r, c) for r in range(len(queries)) for c in top_p(score[r], p, floor)}
        expect_groups(plan.to_mask()[b, h], queries, keys, chosen)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["xattention", "pbs", "jenga", "svg2"])
def test_top_p_with_a_density_takes_what_its_own_p_would(layout: TokenLayout, name: str) -> None:
    """Asked for a density, each head takes what top-p takes at some p of its own (where the budget ends fairly)."""
    recipe = resolve(name, density=0.5, **SMALL)
    _, plan, *_ = made(recipe, layout, structured=True)
    assert float(plan.density()) == pytest.approx(0.5, rel=0.2) or "the least here" in plan.note


def test_sampled_rows_cover_the_grid() -> None:
    layout = TokenLayout(grid=(4, 16, 24), text=9)
    tokens = rows.sample(layout, 64, torch.device("cpu")).tolist()
    assert len(tokens) == len(set(tokens)) > 56
    places = [cell(layout, t) for t in tokens]
    for axis, parts, size in ((0, 4, 1), (1, 4, 4), (2, 4, 6)):
        counts = [sum(p is not None and p[axis] // size == part for p in places) for part in range(parts)]
        assert min(counts) > len(tokens) / parts / 2


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(ODD, marks=pytest.mark.full)], ids=str)
def test_zipvl(layout: TokenLayout) -> None:
    """Keys sorted by the sampled rows' attention; the fewest units that hold p of it serve all rows."""
    _, plan, q, k, _ = made(resolve("zipvl", p=0.7, **blocks(layout)), layout, structured=True)
    sampled = rows.sample(layout, 64, torch.device("cpu")).tolist()
    for b, h in samples(layout):
        mass = weights(q[b, sampled, h], k[b, :, h]).mean(0)
        keys = cut(sorted(along(layout, "gilbert"), key=lambda t: -float(mass[t])), block_of(layout))
        taken = top_p(torch.stack([mass[unit].sum() for unit in keys]), 0.7)
        assert taken == set(range(len(taken)))  # sorted: the first ones
        queries = cut(along(layout, "gilbert"), block_of(layout))
        expect_groups(plan.to_mask()[b, h], queries, keys, {(r, c) for r in range(len(queries)) for c in taken})


@pytest.mark.parametrize(("layout", "share"), [*itertools.product(LAYOUTS, [0.25, 0.5]), (ODD, 0.25)], ids=str)
def test_double_sparsity(layout: TokenLayout, share: float) -> None:
    """Products on the channels of largest mean |q||k|; a unit pair is worth its largest; top-k of each row."""
    _, plan, q, k, _ = made(
        resolve("double-sparsity", density=0.4, share=share, **blocks(layout)), layout, structured=True
    )
    groups = cut(along(layout, "gilbert"), block_of(layout))
    sizes = [len(g) for g in groups]
    count = round(share * 16)
    for b, h in samples(layout):
        weight = (q[b, :, h].abs() * k[b, :, h].abs()).mean(0)
        kept = sorted(range(16), key=lambda c: -float(weight[c]))[:count]
        products = q[b, :, h][:, kept] @ k[b, :, h][:, kept].T / math.sqrt(count)
        chosen = set()
        for r, queries in enumerate(groups):
            worth = torch.stack([products[torch.tensor(queries)[:, None], torch.tensor(g)].max() for g in groups])
            order = [r, *(c for c in stable(worth) if c != r)]
            chosen |= {(r, c) for c in fill(order, sizes, grid_share(layout, 0.4) * sum(sizes))} | {(r, r)}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_paro(layout: TokenLayout) -> None:
    """Each head takes the one of six axis orders whose best blocks, by exact sums, hold most of the attention."""
    _, plan, q, k, _ = made(resolve("paro", density=0.4, **SMALL), layout, structured=True)
    share, sampled = grid_share(layout, 0.4), rows.sample(layout, 64, torch.device("cpu"))
    taken = set()
    for b, h in SAMPLES:
        exact = weights(q[b, :, h], k[b, :, h])
        best = (-1.0, 0, torch.empty(0))
        for order, mask in enumerate(by_axes(layout, exact, share)):
            held = float((exact * mask)[sampled].sum())
            if held > best[0] + 1e-9:
                best = (held, order, mask)
        taken.add(best[1])
        assert torch.equal(plan.to_mask()[b, h], best[2])
    assert len(taken) > 1


@pytest.mark.parametrize(
    ("layout", "columns"),
    [*itertools.product(LAYOUTS, [0.0, 0.4]), pytest.param(ODD, 0.2, marks=pytest.mark.full)],
    ids=str,
)
def test_minference(layout: TokenLayout, columns: float) -> None:
    """Key tiles and displacements that sampled rows attend to most; columns first, then whole displacements."""
    tile = (4, 4, 4) if layout is ODD else (1, 4, 4) if layout.main.frames == 1 else (2, 3, 3)
    recipe = resolve("minference", density=0.4, columns=columns, picture=tile, video=tile, **blocks(layout))
    _, plan, q, k, _ = made(recipe, layout, structured=True)
    groups = boxes(layout, tile)
    corner = [cell(layout, group[0]) for group in groups]
    at = [tuple(c[i] // tile[i] for i in range(3)) for c in corner if c is not None]
    sizes, n = [len(group) for group in groups], len(groups)
    share = grid_share(layout, 0.4)
    apart = {(r, c): tuple(b - a for a, b in zip(at[r], at[c], strict=True)) for r in range(n) for c in range(n)}
    pairs: dict[tuple[int, ...], int] = {}
    for (r, c), move in apart.items():
        pairs[move] = pairs.get(move, 0) + sizes[r] * sizes[c]
    moves = sorted(pairs)
    for b, h in samples(layout):
        column, total, times = torch.zeros(n), dict.fromkeys(moves, 0.0), dict.fromkeys(moves, 0)
        sampled = rows.sample(layout, 64, torch.device("cpu")).tolist()
        for token in sampled:
            exact = weights(q[b, token, h][None], k[b, :, h])[0]
            r = next(i for i, group in enumerate(groups) if token in group)
            for c, group in enumerate(groups):
                held = float(exact[group].sum())
                column[c] += held / len(sampled)
                total[apart[r, c]] += held
                times[apart[r, c]] += 1
        down = fill(stable(column), sizes, share * columns * sum(sizes)) | {stable(column)[0]}
        mean = {move: total[move] / max(times[move], 1) for move in moves}
        ranked = sorted(range(len(moves)), key=lambda i: -mean[moves[i]])
        left = share - sum(sizes[c] for c in down) / sum(sizes)
        kept = fill(ranked, [pairs[move] for move in moves], left * sum(sizes) ** 2) | {ranked[0]}
        along = {moves[i] for i in kept}
        chosen = {(r, c) for r in range(n) for c in range(n) if c in down or apart[r, c] in along or r == c}
        expect_groups(plan.to_mask()[b, h], groups, groups, chosen)
