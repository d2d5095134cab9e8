"""An odd video, 5 x 17 x 23 tokens, and the axes restated for it in plain Python, cell by cell and unit by unit.

Nothing here calls the code of an axis. `planned` runs a recipe through the front door and returns its checked plan.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import dit_accel
from dit_accel.layout import Grid, Pad, Text, TokenLayout
from dit_accel.sparsity.plan import Plan
from dit_accel.sparsity.recipes import resolve

GRID = (5, 17, 23)
LAYOUT = TokenLayout([Text(7), Grid(*GRID), Pad(3)])
CELLS = 5 * 17 * 23
UNIT = 64
Cell = tuple[int, int, int]
Units = list[list[Cell]]


# -- orders, restated -----------------------------------------------------------------------------------------------
def raster_cells() -> list[Cell]:
    return list(itertools.product(*(range(n) for n in GRID)))


def hilbert_cells() -> list[Cell]:
    """Walk the 32 x 32 x 32 curve step by step and note the cells that lie on the grid.

    Skilling's TransposetoAxes, the opposite direction of what the plugin computes.
    """
    bits, walked = 5, []
    for step in range(1 << 3 * bits):
        x = [sum(((step >> (3 * bit + 2 - axis)) & 1) << bit for bit in range(bits)) for axis in range(3)]
        carried = x[2] >> 1
        for axis in (2, 1):
            x[axis] ^= x[axis - 1]
        x[0] ^= carried
        for level in range(1, bits):
            bit = 1 << level
            for axis in (2, 1, 0):
                if x[axis] & bit:
                    x[0] ^= bit - 1
                else:
                    swap = (x[0] ^ x[axis]) & (bit - 1)
                    x[0] ^= swap
                    x[axis] ^= swap
        if all(x[axis] < GRID[axis] for axis in range(3)):
            walked.append((x[0], x[1], x[2]))
    return walked


def cut_runs(cells: list[Cell]) -> Units:
    return [cells[i : i + UNIT] for i in range(0, len(cells), UNIT)]


def cut_tiles(side: Cell) -> Units:
    tiles: dict[Cell, list[Cell]] = {}
    for f, h, w in raster_cells():
        tiles.setdefault((f // side[0], h // side[1], w // side[2]), []).append((f, h, w))
    return list(tiles.values())


# order: its settings, its units. The tiles of GRAT, 4 x 8 x 8, leave 18 choices here and are halved twice; those of
# DraftAttention, 1 x 8 x 16, leave 30 and are halved once.
ORDERS: dict[str, tuple[dict[str, Any], Cell | None]] = {
    "raster": ({"kind": "raster"}, None),
    "hilbert": ({"kind": "hilbert"}, None),
    "tile": ({"kind": "tile", "video": (4, 8, 8)}, (4, 4, 4)),
    "wfh": ({"kind": "axes", "axes": "wfh"}, None),
    "fhw whole": ({"kind": "axes", "axes": "fhw", "whole": True}, None),
    "hwf whole": ({"kind": "axes", "axes": "hwf", "whole": True}, None),
    "frame tile": ({"kind": "tile", "video": (1, 8, 16)}, (1, 8, 8)),
}


@lru_cache
def units_of(order: str) -> Units:
    side = ORDERS[order][1]
    if side:
        return cut_tiles(side)
    if order == "hilbert":
        return cut_runs(hilbert_cells())
    letters = [ORDERS[order][0].get("axes", "fhw").index(letter) for letter in "fhw"]
    cells = [
        (at[letters[0]], at[letters[1]], at[letters[2]])
        for at in itertools.product(*(range(GRID["fhw".index(a)]) for a in ORDERS[order][0].get("axes", "fhw")))
    ]
    if not ORDERS[order][0].get("whole"):
        return cut_runs(cells)
    slowest = "fhw".index(ORDERS[order][0]["axes"][0])
    slices = [[cell for cell in cells if cell[slowest] == at] for at in range(GRID[slowest])]
    return [run for cells in slices for run in cut_runs(cells)]


def token(cell: Cell) -> int:
    return 7 + (cell[0] * GRID[1] + cell[1]) * GRID[2] + cell[2]


# -- scores, restated -----------------------------------------------------------------------------------------------
def positions(order: str, units: Units) -> np.ndarray:
    """Return where units lie, in unit lengths: the tile's number, or the middle of the run over the side of a cube."""
    side = ORDERS[order][1]
    if side:
        return np.array([[c // s for c, s in zip(unit[0], side, strict=True)] for unit in units], np.float32)
    return np.array([np.mean(unit, axis=0) / UNIT ** (1 / 3) for unit in units]).astype(np.float32)


def geometry(order: str, units: Units, shape: str) -> np.ndarray:
    at = positions(order, units)
    score = np.empty((len(units), len(units)), np.float32)
    for i, j in itertools.product(range(len(units)), repeat=2):
        apart = np.abs(at[i] - at[j])
        rule = max(apart) if shape == "window" else min(apart)
        straight = np.sqrt(apart[0] * apart[0] + apart[1] * apart[1] + apart[2] * apart[2])
        score[i, j] = -(rule + np.float32(1e-3) * straight)
    return score


def pooled(units: Units, q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    mean_q = torch.stack([q[[token(c) for c in unit]].double().mean(0) for unit in units])
    mean_k = torch.stack([k[[token(c) for c in unit]].double().mean(0) for unit in units])
    return (mean_q @ mean_k.T / math.sqrt(q.shape[-1])).softmax(-1).numpy()


def finer(score: dict[str, Any], units: Units, q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """Softmax over short runs of tokens inside the units, a key run counted by its tokens, averaged to units."""
    length = score.get("tokens") or score["stride"]
    runs = [(u, unit[i : i + length]) for u, unit in enumerate(units) for i in range(0, len(unit), length)]
    tokens = [[token(cell) for cell in run] for _, run in runs]
    sizes = torch.tensor([len(run) for _, run in runs]).double()

    def tall(x: torch.Tensor, turned: bool) -> torch.Tensor:
        rows = []
        for run in tokens:
            full = torch.cat([x[run].double(), x[run].double().mean(0).expand(length - len(run), -1)])
            rows.append(full.flip(0).flatten() if turned else full.flatten())
        return torch.stack(rows)

    if score["kind"] == "subtiles":
        logits = torch.stack([q[run].double().mean(0) for run in tokens])
        logits = logits @ torch.stack([k[run].double().mean(0) for run in tokens]).T
    else:
        logits = tall(q, turned=True) @ tall(k, turned=False).T / length
    share = (logits / math.sqrt(q.shape[-1]) + sizes.log()).softmax(-1)
    out = np.zeros((len(units), len(units)))
    for r, (row, _) in enumerate(runs):
        for c, (col, _) in enumerate(runs):
            out[row, col] += float(share[r, c] * sizes[r]) / len(units[row])
    return out


def mass(units: Units, q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    """Exact attention over all keys, text included, added up over the keys of a unit, averaged over its queries."""
    share = (q.double() @ k.double().T / math.sqrt(q.shape[-1])).softmax(-1)
    tokens = [[token(cell) for cell in unit] for unit in units]
    return np.array([[float(share[rows][:, cols].sum(-1).mean()) for cols in tokens] for rows in tokens])


def scored(score: dict[str, Any], units: Units, q: torch.Tensor, k: torch.Tensor) -> np.ndarray:
    if score["kind"] == "mass":
        return mass(units, q, k)
    return pooled(units, q, k) if score["kind"] == "pooled" else finer(score, units, q, k)


# -- selectors, restated --------------------------------------------------------------------------------------------
def fill(entries: list[Any], worth: Any, cost: Any, budget: float) -> list[Any]:
    """Take entries, best first, while at least half of each still fits."""
    taken, spent = [], 0.0
    for entry in sorted(entries, key=worth, reverse=True):
        spent += cost(entry)
        if spent - cost(entry) / 2 <= budget:
            taken.append(entry)
    return taken


def top_k(score: np.ndarray, keep: np.ndarray, sizes: list[int], share: float) -> np.ndarray:
    chosen = keep.copy()
    for row in range(len(sizes)):
        entries = [(keep[row, col], score[row, col], col) for col in range(len(sizes))]
        for *_, col in fill(entries, lambda e: e[:2], lambda e: sizes[e[2]], share * sum(sizes)):
            chosen[row, col] = True
    return chosen


def percentile(score: np.ndarray, keep: np.ndarray, sizes: list[int], share: float) -> np.ndarray:
    chosen = keep.copy()
    pairs = list(itertools.product(range(len(sizes)), repeat=2))
    budget = share * sum(sizes) ** 2
    for r, c in fill(pairs, lambda p: (keep[p], score[p]), lambda p: sizes[p[0]] * sizes[p[1]], budget):
        chosen[r, c] = True
    return chosen


def top_p(score: np.ndarray, keep: np.ndarray, p: float, least: float = 0.0) -> np.ndarray:
    chosen = keep.copy()
    for r in range(len(score)):
        before = 0.0
        for rank, c in enumerate(np.argsort(-score[r], kind="stable")):
            chosen[r, c] |= before < p * score[r].sum() or rank < int(least * len(score))
            before += score[r, c]
    return chosen


def cumulative(score: np.ndarray, keep: np.ndarray, p: float) -> np.ndarray:
    """Take pairs over all rows until they hold p of everything; each row's best in any case."""
    chosen, before = keep.copy(), 0.0
    chosen[np.arange(len(score)), score.argmax(1)] = True
    for place in np.argsort(-score, axis=None, kind="stable"):
        if before >= p * score.sum():
            break
        chosen[np.unravel_index(place, score.shape)] = True
        before += score.flat[place]
    return chosen


def restated(select: dict[str, Any], score: np.ndarray, sizes: list[int]) -> np.ndarray:
    keep = np.eye(len(sizes), dtype=bool)
    if select["kind"] == "within":
        return keep | (score >= -(select["radius"] + 0.5))
    if select["kind"] == "top-p":
        return top_p(score, keep, select["p"], select.get("least", 0.0))
    if select["kind"] == "cumulative":
        return cumulative(score, keep, select["p"])
    share = (select["density"] * LAYOUT.length**2 - (LAYOUT.length**2 - CELLS**2)) / CELLS**2
    return (top_k if select["kind"] == "top-k" else percentile)(score, keep, sizes, share)


def spelled_out(chosen: np.ndarray, units: Units) -> torch.Tensor:
    """Turn chosen unit pairs into the mask of all tokens; text and padding see all and are seen by all."""
    mask = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    owner = np.empty(CELLS, int)
    for number, unit in enumerate(units):
        owner[[token(cell) - 7 for cell in unit]] = number
    mask[7 : 7 + CELLS, 7 : 7 + CELLS] = torch.from_numpy(chosen[owner[:, None], owner[None]])
    return mask


# -- the plans under test -----------------------------------------------------------------------------------------
def planned(recipe: dict[str, Any], heads: int = 2) -> tuple[Plan, torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    settled = resolve({"name": "odd", "block_q": UNIT, "block_k": UNIT, "dense_steps": 0, **recipe})
    g = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(2, LAYOUT.length, heads, 8, generator=g) for _ in range(3))
    out, plan = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=settled, return_plan=True)
    return plan.check(), q, k, v, out
