"""The calls that `dit-accel tune-kernels` measures, the checks on them, and the tiles that are worth a try."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import Precision, Predicate
from dit_accel.kernels.block_sparse.api import _for_hopper
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.quantised import rounded_problem
from dit_accel.kernels.block_sparse.reference import attend as reference
from dit_accel.kernels.block_sparse.reference import block_tokens
from dit_accel.kernels.block_sparse.tiles import Kind, Tile

DENSITY = 0.25
WORST_ERROR = 1e-2  # of half-precision operands; a wrong mask or a race is far above
WORST_LSE = 1e-3
HOLED = 8  # one in so many key blocks ends in holes

# by kind, what calls have: of the one that is timed, then of those that a tile must get right, too
FLAVOURS: dict[Kind, tuple[str, ...]] = {
    "plain": ("ordered", "raster", "ragged"),
    "holes": ("holes",),
    "predicate": ("box", "disk", "box holes"),
    "bias": ("bias", "bias holes", "bias box"),
}


@dataclass(frozen=True)
class Case:
    """One kind of call: as `tuned.Entry` tells them apart, at so many tokens and heads."""

    precision: Precision
    kind: Kind
    dim: int
    block_q: int
    block_k: int
    tokens: int = 16_384
    heads: int = 16

    @property
    def name(self) -> str:
        prefix = "" if self.precision == "as given" else f"{self.precision}-"
        return f"{prefix}{self.kind}-d{self.dim}-{self.block_q}x{self.block_k}"


def _cases() -> Iterator[Case]:
    """All calls, those that recipes make most first."""
    blocks, dims, calls = ((128, 64), (128, 128), (64, 64)), (128, 64), ("holes", "plain", "predicate", "bias")
    for block, kind, dim in itertools.product(blocks, calls, dims):
        yield Case("as given", kind, dim, *block)
    for block, kind, dim in itertools.product(blocks[:2], calls[:2], dims):
        yield Case("int8", kind, dim, *block)


CASES = tuple(_cases())


def takes_other_kernel(case: Case, device: torch.device) -> bool:
    """Say whether such calls run on the Hopper kernel here, which takes no tiles from a table."""
    small = make_problem(replace(case, tokens=512, heads=1), FLAVOURS[case.kind][0], device, torch.bfloat16)
    return _for_hopper(small)


# --- calls ---


def make_problem(case: Case, flavour: str, device: torch.device, dtype: torch.dtype) -> Problem:
    """Make a call on noise, of which every query attends some key."""
    has = set(flavour.split())
    tokens = case.tokens - 40 if "ragged" in has else case.tokens
    q, k, v = (torch.randn(1, tokens, case.heads, case.dim, device=device, dtype=dtype) for _ in range(3))
    q_order = k_order = None
    if has & {"ordered", "holes"}:
        q_order, k_order = (_order(tokens, n, "holes" in has, device) for n in (case.block_q, case.block_k))
    blocks_q = -(-tokens // case.block_q) if q_order is None else q_order.shape[2] // case.block_q
    rule = _rule(tokens, "disk" if "disk" in has else "box", device) if has & {"box", "disk"} else None
    whole = _whole(k_order, tokens, case.block_k, device)
    index, count, full = _lists(case, blocks_q, whole, rule is not None)
    bias = torch.randn(1, 1, tokens, device=device) if "bias" in has else None
    full = full if "holes" in has or rule is not None else count
    blocks = (case.block_q, case.block_k, full, q_order, k_order, bias, rule)
    return Problem(q, k, v, index, count, *blocks, case.dim**-0.5, precision=case.precision)


def _rule(tokens: int, kind: Literal["box", "disk"], device: torch.device) -> Predicate:
    """Near tokens of a video of 32 x 32 frames."""
    place = torch.arange(tokens, dtype=torch.int32, device=device)
    coords = torch.stack([place // 1024, place // 32 % 32, place % 32])
    return Predicate(kind, (tokens // 2048 + 1, 12, 12), coords, coords)


def _order(tokens: int, block: int, holes: bool, device: torch.device) -> Tensor:
    """Slot -> token of a random order; with holes, one block in `HOLED` ends in a quarter of them."""
    spare = -(-tokens // block) // (4 * HOLED - 1) + 1 if holes else 0
    slots = torch.arange((-(-tokens // block) + spare) * block, device=device)
    free = slots[(slots // block % HOLED != HOLED - 1) | (slots % block < block - block // 4)] if holes else slots
    order = torch.full((1, 1, len(slots)), -1, dtype=torch.int32, device=device)
    order[0, 0, free[:tokens]] = torch.randperm(tokens, device=device).int()
    return order


def _whole(order: Tensor | None, tokens: int, block: int, device: torch.device) -> Tensor:
    """Say of each key block whether all of its slots hold tokens, bool [Nk]."""
    if order is None:
        return torch.arange(1, -(-tokens // block) + 1, device=device) * block <= tokens
    return (order[0, 0].view(-1, block) >= 0).all(-1)


def _lists(case: Case, blocks_q: int, whole: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Random key blocks of each row, full ones first; the first key block, which is full, is in every list.

    `half`: only every other whole block counts as full, so that a predicate is asked on the others.
    """
    blocks = len(whole)
    kept = max(2, round(DENSITY * blocks))
    chance = torch.rand(1, case.heads, blocks_q, blocks, device=whole.device)
    chance[..., 0] = -1.0
    picked = chance.argsort(-1)[..., :kept]
    counts = whole & (torch.arange(blocks, device=whole.device) % 2 == 0) if half else whole
    full = counts[picked]
    index = picked.gather(-1, full.logical_not().int().argsort(dim=-1, stable=True)).int().contiguous()
    return index, torch.full_like(index[..., 0], kept), full.sum(-1).int()


# --- checks ---


@dataclass(frozen=True)
class Gold:
    """What a few query blocks of two heads must come to: the tokens, out and lse in float64."""

    rows: Tensor
    heads: Tensor
    out: Tensor
    lse: Tensor


def gold(problem: Problem) -> Gold:
    """Run the reference in float64 on a few query blocks of a call; int8 is held against its own rounded numbers."""
    lost = None
    if problem.precision == "int8":
        problem, lost = rounded_problem(problem)
    device, heads = problem.q.device, torch.tensor([0, problem.q.shape[2] - 1], device=problem.q.device)
    blocks = problem.index.shape[2]
    chosen = torch.tensor(sorted({0, blocks // 2, blocks - 2, blocks - 1}), device=device).clamp(min=0)
    tokens = block_tokens(problem.q_order, blocks, problem.block_q, problem.q.shape[1], device)[:, :, chosen]

    def part(x: Tensor | None, rows: bool) -> Tensor | None:
        if x is None:
            return None
        x = x[:, heads] if x.shape[1] > 1 else x
        return x[:, :, chosen].contiguous() if rows else x

    count = part(problem.count, True)
    q, k, v = (x[:, :, heads].double() for x in (problem.q, problem.k, problem.v))
    small = replace(
        problem,
        q=q,
        k=k,
        v=v,
        index=part(problem.index, True),
        count=count,
        full_count=count if problem.full_count is problem.count else part(problem.full_count, True),
        q_order=tokens.flatten(2).int().contiguous(),
        k_order=part(problem.k_order, False),
        key_bias=part(problem.key_bias, False),
        precision="as given",
    )
    out, lse = reference(small)
    rows = tokens.flatten()[tokens.flatten() >= 0].long()
    lse = lse.double() if lost is None else lse.double() + lost[:, heads].double()
    return Gold(rows, heads, out[0, rows], lse[0][:, rows])


def error(problem: Problem, expected: Gold, tile: Tile) -> float:
    """Return ‖out - gold‖ / ‖gold‖ of a tile; NaN where something was not written, lse is off or two runs differ."""
    poison = [torch.full_like(problem.q, math.nan) for _ in range(4)]  # what the allocator hands out next
    del poison
    out, lse = attend(problem, tile)
    again, _ = attend(problem, tile)
    if not (out.isfinite().all() and lse.isfinite().all() and torch.equal(out, again)):
        return math.nan
    if float((lse[0, expected.heads][:, expected.rows] - expected.lse).abs().max()) > WORST_LSE:
        return math.nan
    got = out[0, expected.rows][:, expected.heads].double()
    return float((got - expected.out).norm() / expected.out.norm())


def attend(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """Run the kernel of a call's precision with a tile."""
    if problem.precision == "int8":
        from dit_accel.kernels.block_sparse import quantised_triton as kernel
    else:
        from dit_accel.kernels.block_sparse import triton as kernel
    return kernel.attend(problem, tile)


# --- tiles ---

_NUMBERS = (24, 208)  # of a tile and its sums, that a thread may hold


def candidates(case: Case, before: Tile, capability: tuple[int, int]) -> list[Tile]:
    """Return other tiles that may be faster."""
    rows = [n for n in (128, 64, 32) if min(64, case.block_q) <= n <= case.block_q]
    columns = [n for n in (128, 64, 32) if n <= case.block_k]
    made = (
        Tile(q, k, warps, stages, *copies)
        for q, k, warps, stages, copies in itertools.product(
            rows, columns, (4, 8), (2, 3, 4), _copies(case, before, capability)
        )
    )
    return [tile for tile in made if tile != before and _may_fit(case, tile, capability)]


def _copies(case: Case, before: Tile, capability: tuple[int, int]) -> list[tuple[bool, bool]]:
    """Ways to bring keys in that make a difference to a case: (tma, pack)."""
    packs = (True, False) if case.precision == "as given" and case.kind in ("plain", "holes") else (before.pack,)
    engines = (True, False) if capability >= (9, 0) and case.kind != "bias" else (False,)
    return [(tma, pack) for tma, pack in itertools.product(engines, packs) if pack or not tma or len(packs) == 1]


def _may_fit(case: Case, tile: Tile, capability: tuple[int, int]) -> bool:
    """Leave out what cannot fit the shared memory, or would have far too few or too many numbers a thread."""
    room = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) << 10
    each = case.dim * (3 if case.precision == "int8" else 4)  # bytes of a key and its value
    numbers = tile.q * (case.dim + tile.k) // (32 * tile.warps)
    return tile.stages * tile.k * each + tile.q * case.dim * 2 <= room and _NUMBERS[0] <= numbers <= _NUMBERS[1]


def distance(tile: Tile, other: Tile) -> int:
    """In how many settings two tiles differ."""
    return sum(getattr(tile, name) != getattr(other, name) for name in ("q", "k", "warps", "stages", "tma", "pack"))
