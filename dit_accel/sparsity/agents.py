"""An operator: queries reach keys through agents. It has a dense limit, but no mask of pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..config import AgentSelect
from ..kernels.merge import merge_attention
from ..kernels.unit_means import unit_means
from ..layout import Grid, TokenLayout
from .orders import Shape
from .plan import Branch, Operands, Plan, Result, from_units
from .tiling import Tiling

LONG = 0.1  # weight of ln(longest / shortest side) of a cell beside the share by which their number is missed


@dataclass(frozen=True, eq=False)
class Agents:
    """Agent attention among the tokens of the grid; text queries get nothing from it.

    `slots` int32 [1, 1, tokens]: the grid's tokens, cell by cell. `bounds` int64 [1, 1, agents + 1]: where each cell
    begins. `cell` int64 [tokens], -1 for text. `hear`: all agents attend to all keys of the grid; `tell`: all queries
    of the grid to all agents.
    """

    slots: torch.Tensor
    bounds: torch.Tensor
    cell: torch.Tensor
    hear: Branch
    tell: Branch
    power: float
    value: float

    @property
    def nbytes(self) -> int:
        own = sum(t.numel() * t.element_size() for t in (self.slots, self.bounds, self.cell))
        return own + self.hear.nbytes + self.tell.nbytes

    def run(self, given: Operands, into: Result | None = None) -> Result:
        """Return out [B, S, H, D] and lse [B, H, S]: what a query's keys on the grid weigh, its agent's keys do."""
        agents = unit_means(given.q, self.slots, self.bounds).transpose(1, 2).to(given.q.dtype)
        heard, lse = self.hear.run(replace(given, q=agents))
        out, _ = self.tell.run(Operands(given.q, agents, heard, given.scale**self.power))
        lse = lse[:, :, self.cell.clamp(min=0)].masked_fill(self.cell < 0, float("-inf"))
        out = out + self.value * given.v
        return (out, lse) if into is None else merge_attention((into[0], out), (into[1], lse))


def agent_plan(tiling: Tiling, select: AgentSelect, share: float, device: torch.device) -> Plan:
    """Return a plan that is an operator for the grid and exact for all pairs with text, merged by log-sum-exp.

    Agent Attention, Han et al. 2023, arXiv 2312.08874, as its AgentSD uses it without training: softmax(Q A)
    softmax(A K) V + value V, the first of these scaled by scale ** power. There the agents are mean hidden states of a
    picture's cells; here the mean queries of the cells of every grid, as many as `share` of its pairs pays for, an
    agent costing two pairs a token.
    """
    layout = tiling.layout
    order, cell = _cells(layout, share)
    sizes = np.bincount(cell[order])
    agents, cells = len(sizes), len(order)
    slots = torch.from_numpy(order.astype(np.int32)).to(device)[None, None]
    bounds = torch.from_numpy(np.concatenate([[0], sizes.cumsum()])).to(device)[None, None]
    block_q, block_k = tiling.block_q, tiling.block_k
    operator = Agents(
        slots=slots,
        bounds=bounds,
        cell=torch.from_numpy(cell).to(device),
        hear=replace(_everything(agents, cells, block_q, block_k, device), k_order=_padded(slots, block_k)),
        tell=replace(_everything(cells, agents, block_q, block_k, device), q_order=_padded(slots, block_q)),
        power=select.power,
        value=select.value,
    )
    pairs = torch.tensor([[2 * agents * cells]], device=device)
    plan = Plan(layout.length, layout.length, pooled=(operator,), pairs=pairs, operator="agent attention")
    text = ~(tiling.grid[:, None] & tiling.grid)
    if not text.any():
        return plan
    words = from_units(torch.from_numpy(text)[None, None].to(device), tiling.on(device).cut)
    assert words.pairs is not None
    return replace(plan, branches=words.branches, pairs=pairs + words.pairs)


def _everything(queries: int, keys: int, block_q: int, block_k: int, device: torch.device) -> Branch:
    """List all key blocks for all query blocks; a last block that is not full comes last."""
    rows, cols = -(-queries // block_q), -(-keys // block_k)
    index = torch.arange(cols, dtype=torch.int32, device=device).expand(1, 1, rows, cols).contiguous()
    count, full = (torch.full((1, 1, rows), n, dtype=torch.int32, device=device) for n in (cols, keys // block_k))
    return Branch(block_q, block_k, index, count, full_count=full)


def _padded(slots: torch.Tensor, block: int) -> torch.Tensor:
    return torch.nn.functional.pad(slots, (0, -slots.shape[-1] % block), value=-1)


def _cells(layout: TokenLayout, share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the grid's tokens cell by cell, and the cell of every token, -1 for text."""
    cell = np.full(layout.length, -1, dtype=np.int64)
    for start, segment in layout.spans():
        if isinstance(segment, Grid):
            parts = cells_of(segment.shape, max(share * segment.length / 2, 1))
            at = np.unravel_index(np.arange(segment.length), segment.shape)
            number = np.ravel_multi_index(
                tuple(where * part // extent for where, part, extent in zip(at, parts, segment.shape, strict=True)),
                parts,
            )
            cell[start : start + segment.length] = number + cell.max() + 1
    order = cell.argsort(kind="stable")
    return order[layout.text :], cell


def cells_of(shape: Shape, count: float) -> Shape:
    """Return into how many parts each axis is cut so that there are about `count` cells, as long as wide."""
    parts = np.stack(np.meshgrid(*(np.arange(1, extent + 1) for extent in shape), indexing="ij"), -1).reshape(-1, 3)
    side = np.array(shape) / parts
    longest, shortest = side.max(-1), np.where(np.array(shape) > 1, side, np.inf).min(-1)
    cost = np.abs(parts.prod(-1) / count - 1) + LONG * np.log(np.maximum(longest / shortest, 1))
    best = parts[cost.argmin()]
    return int(best[0]), int(best[1]), int(best[2])
