"""Words in which the papers' rules are restated, token by token: where a token lies, which tokens share a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

import dit_accel
from dit_accel.call import AttentionCall, Site
from dit_accel.config import Recipe
from dit_accel.layout import Grid, TokenLayout
from dit_accel.sparsity.plan import Plan
from dit_accel.step import StepInfo

Group = list[int]


def block_of(layout: TokenLayout) -> int:
    """Return the kernel tile that a layout is tested with: the odd video would have too many of the smallest."""
    return 64 if layout.length > 1000 else 16


def samples(layout: TokenLayout, heads: int = 2) -> list[tuple[int, int]]:
    """List the samples and heads that `tensors` makes: the odd video has one sample."""
    return [(b, h) for b in range(1 if layout.length > 1000 else 2) for h in range(heads)]


def tensors(
    layout: TokenLayout, seed: int = 0, heads: int = 2, structured: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random q, k, v; structured ones vary slowly over the grid, as real ones do."""
    g = torch.Generator().manual_seed(seed)
    batch = samples(layout)[-1][0] + 1
    q, k, v = (torch.randn(batch, layout.length, heads, 16, generator=g) for _ in range(3))
    if structured:
        waves = torch.randn(3, batch, heads, 16, 3, generator=g)
        place = torch.tensor([cell(layout, t) or (0, 0, 0) for t in range(layout.length)]).float()
        slow = torch.einsum("sc,xbhdc->xbshd", place / 4, waves).sin()
        q, k, v = (1.5 * slow[i] + 0.4 * x for i, x in enumerate((q, k, v)))
    return q, k, v


def made(
    recipe: Recipe, layout: TokenLayout, seed: int = 0, heads: int = 2, structured: bool = False
) -> tuple[torch.Tensor, Plan, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a recipe on `tensors`; return its output and its checked plan with them."""
    q, k, v = tensors(layout, seed, heads, structured)
    out, plan = dit_accel.attention(q, k, v, layout=layout, recipe=recipe, return_plan=True)
    return out, plan.check(), q, k, v


def with_tiles(recipe: Recipe, picture: tuple[int, int, int], video: tuple[int, int, int]) -> Recipe:
    """Return a recipe with tiles of this size, where it lies in tiles, for all its heads."""
    small = {"kind": "tile", "picture": picture, "video": video}
    if recipe.order.kind == "tile":
        return recipe.override(order=small)
    if recipe.heads is None or recipe.heads.options[0].order.kind != "tile":
        return recipe
    options = tuple({**option.model_dump(), "order": small} for option in recipe.heads.options)
    return recipe.override(heads={**recipe.heads.model_dump(), "options": options})


def cell(layout: TokenLayout, token: int) -> tuple[int, int, int] | None:
    """Return the grid coordinates of a token, None for text."""
    for start, segment in layout.spans():
        if isinstance(segment, Grid) and start <= token < start + segment.length:
            f, rest = divmod(token - start, segment.height * segment.width)
            return (f, *divmod(rest, segment.width))
    return None


def on_grid(layout: TokenLayout) -> list[int]:
    """List the tokens of the grid."""
    return [t for t in range(layout.length) if cell(layout, t) is not None]


def cut(tokens: Iterable[int], length: int) -> list[Group]:
    """Cut a sequence into runs."""
    line = list(tokens)
    return [line[i : i + length] for i in range(0, len(line), length)]


def boxes(layout: TokenLayout, tile: tuple[int, int, int]) -> list[Group]:
    """Group the grid's tokens into tiles, in raster order."""
    groups: dict[tuple[int, ...], Group] = {}
    for token in on_grid(layout):
        at = cell(layout, token)
        assert at is not None
        groups.setdefault(tuple(at[i] // tile[i] for i in range(3)), []).append(token)
    return [groups[key] for key in sorted(groups)]


def expect(mask: torch.Tensor, layout: TokenLayout, rule: Callable[[int, int], bool]) -> None:
    """Check one head's mask [tokens, tokens]: `rule` for pairs of the grid, everything for pairs with text."""
    grid = set(on_grid(layout))
    for i in range(layout.length):
        for j in range(layout.length):
            expected = rule(i, j) if i in grid and j in grid else True
            assert bool(mask[i, j]) == expected, (i, j, cell(layout, i), cell(layout, j))


def expect_groups(mask: torch.Tensor, rows: list[Group], cols: list[Group], chosen: set[tuple[int, int]]) -> None:
    """Check that one head's mask holds exactly the chosen pairs of groups, each of them whole."""
    for r, queries in enumerate(rows):
        for c, keys in enumerate(cols):
            got = mask[torch.tensor(queries)[:, None], torch.tensor(keys)[None]]
            assert bool(got.all()) == bool(got.any()) == ((r, c) in chosen), (r, c)


def means(x: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """Average [tokens, D] over each group."""
    return torch.stack([x[group].mean(0) for group in groups])


def top_p(row: torch.Tensor, p: float, least: int = 0) -> set[int]:
    """Take the best entries until their share reaches p, the crossing one included, and at least so many."""
    share, taken, mass = row / row.sum(), set[int](), 0.0
    for rank, c in enumerate(sorted(range(len(row)), key=lambda c: -float(row[c]))):
        if mass >= p and rank >= least:
            break
        taken.add(c)
        mass += float(share[c])
    return taken


def fill(order: Iterable[int], costs: list[int], budget: float) -> set[int]:
    """Take entries in order while at least half of each still fits."""
    taken, spent = set[int](), 0
    for i in order:
        spent += costs[i]
        if spent - costs[i] / 2 <= budget:
            taken.add(i)
    return taken


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Exact attention of [tokens, D] queries to [tokens, D] keys."""
    return (q.double() @ k.double().T / math.sqrt(q.shape[-1])).softmax(-1)


def called(
    layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0, step: int = 0
) -> AttentionCall:
    """Return the call of one layer at one step of ten."""
    site = Site(f"layer.{layer}", "layer", layer, torch.nn.Identity(), 20)
    return AttentionCall(site, StepInfo(1, step, 10, "cond"), layout, q, k, v, 0.25, stock=lambda q, k, v: v)


def coclusters(q: torch.Tensor, k: torch.Tensor, counts: tuple[int, int], rounds: int) -> list[torch.Tensor]:
    """Cluster [tokens, D] queries and keys by the directions of their products with the other side's centroids."""
    middle = [[x[(i * len(x) + len(x) // 2) // n] for i in range(n)] for x, n in zip((q, k), counts, strict=True)]
    labels = [torch.empty(0), torch.empty(0)]
    for _ in range(rounds):
        for side, tokens in ((1, k), (0, q)):  # the keys first
            other = torch.stack(middle[1 - side]).double()
            profiles = [centroid.double() @ other.T for centroid in middle[side]]
            likeness = torch.stack([_cosines(tokens.double() @ other.T, profile) for profile in profiles], -1)
            labels[side] = likeness.argmax(-1)
            for c in range(counts[side]):
                if (labels[side] == c).any():
                    middle[side][c] = tokens[labels[side] == c].mean(0)
    return labels


def _cosines(rows: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    return (rows @ one) / (rows.norm(dim=-1) * one.norm())


def band(groups: list[list[int]], share: float) -> set[tuple[int, int]]:
    """The pairs of runs whose middles are nearest in the sequence, nearest count to the share; equals together."""
    ends = torch.tensor([0, *[len(g) for g in groups]]).cumsum(0).double()
    middle = (ends[1:] + ends[:-1]) / 2
    apart = (middle[:, None] - middle).abs()
    sizes = torch.tensor([len(g) for g in groups]).double()
    total = sizes.sum() ** 2
    width = min(
        sorted(set(apart.flatten().tolist())),
        key=lambda w: abs(float(sizes @ (apart <= w + 1e-9).double() @ sizes / total) - share),
    )
    return {(r, c) for r in range(len(groups)) for c in range(len(groups)) if apart[r, c] <= width + 1e-9}


def patterns(layout: TokenLayout, share: float) -> list[tuple[list[list[int]], set[tuple[int, int]]]]:
    """The spatial and the temporal pattern of Sparse VideoGen: frame-major and position-major runs, each a band."""
    grid = torch.tensor(on_grid(layout)).view(layout.main.shape)
    lines = (grid.flatten().tolist(), grid.permute(1, 2, 0).flatten().tolist())
    return [(cut(line, 16), band(cut(line, 16), share)) for line in lines]


def spelled(layout: TokenLayout, groups: list[list[int]], chosen: set[tuple[int, int]]) -> torch.Tensor:
    """The mask over tokens of chosen pairs of groups, and of everything with text."""
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    grid = torch.tensor(on_grid(layout))
    mask[grid[:, None], grid] = False
    for r, c in chosen:
        mask[torch.tensor(groups[r])[:, None], torch.tensor(groups[c])] = True
    return mask


def by_axes(layout: TokenLayout, exact: torch.Tensor, share: float) -> list[torch.Tensor]:
    """PAROAttention's masks of one head, for each order of the axes: the best blocks by exact sums, no row empty."""
    grid = torch.tensor(on_grid(layout)).view(layout.main.shape)
    masks = []
    for axes in ("fhw", "fwh", "hfw", "hwf", "wfh", "whf"):
        groups = cut(grid.permute(*["fhw".index(a) for a in axes]).flatten().tolist(), 16)
        sizes = [len(g) for g in groups]
        pairs = [(r, c) for r in range(len(groups)) for c in range(len(groups))]
        at = {(r, c): (torch.tensor(groups[r])[:, None], torch.tensor(groups[c])) for r, c in pairs}
        score = {pair: float(exact[at[pair]].sum(-1).mean()) for pair in pairs}
        ranked = sorted(range(len(pairs)), key=lambda i: -score[pairs[i]])
        chosen = {pairs[i] for i in fill(ranked, [sizes[r] * sizes[c] for r, c in pairs], share * sum(sizes) ** 2)}
        for r in range(len(groups)):
            if not any(p[0] == r for p in chosen):
                chosen.add(max((p for p in pairs if p[0] == r), key=lambda p: score[p]))
        masks.append(spelled(layout, groups, chosen))
    return masks
