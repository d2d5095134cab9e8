"""Sampled exact rows: the attention of a few queries, spread over the grid, to all keys."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from ..kernels.choice import wants_triton
from ..kernels.row_shares import key_shares, unit_shares
from ..layout import Grid, TokenLayout
from .cut import Side

BYTES = 256 << 20  # of logits held at once


@lru_cache(maxsize=64)
def sample(layout: TokenLayout, count: int, device: torch.device) -> torch.Tensor:
    """Return about `count` tokens spread evenly over the main grid, or all of them, int64 [rows]; always the same ones.

    One per cell of a coarse grid, jittered by a fixed low-discrepancy sequence so that no row or column is favoured.
    Papers on language models take the last queries instead, which in a picture are one corner. Words that are ranked
    like a grid's tokens are asked by their share of both, evenly spaced.
    """
    lines = [(s, g.length) for s, g in layout.spans() if isinstance(g, Grid) and g.role == "text"]
    every = sum(length for _, length in lines) + layout.main.length
    taken = [min(round(count * length / every), length) for _, length in lines]
    words = [
        start + (2 * torch.arange(n) + 1) * length // (2 * n)
        for (start, length), n in zip(lines, taken, strict=True)
        if n
    ]
    cells = _on_main(layout, max(count - sum(taken), 1))
    return torch.cat([*words, cells]).sort().values.to(device)


def _on_main(layout: TokenLayout, count: int) -> torch.Tensor:
    start, grid = next((s, g) for s, g in layout.spans() if isinstance(g, Grid) and g == layout.main)
    if count >= grid.length:
        return torch.arange(start, start + grid.length)
    # Roberts' R3 sequence: its points fill the unit cube evenly at any count
    golden = 1.2207440846057596
    points = (0.5 + np.arange(1, count + 1)[:, None] * golden ** -np.arange(1, 4)) % 1
    cells = (points * np.array(grid.shape)).astype(np.int64)
    tokens = start + np.ravel_multi_index((cells[:, 0], cells[:, 1], cells[:, 2]), grid.shape)
    return torch.from_numpy(np.unique(tokens))


def operand(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor [B, H, ...] as `product` takes it: half precision as it is on CUDA, else float32."""
    if not (x.is_cuda and wants_triton(x) and x.dtype in (torch.float16, torch.bfloat16)):
        return x.float()
    return x if x.shape[0] == 1 else x.contiguous()  # so that samples and heads are one axis without a copy


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply operands, [B, H, m, c] with [B, H, c, n], summed up in and returned as float32."""
    if a.dtype == torch.float32:
        return a @ b
    flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return flat.unflatten(0, a.shape[:2])


def logits(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield runs of `rows` and their unscaled products with all keys, float32 [B, H, run, keys].

    `q`, `k` [B, S, H, D]. Memory stays below `BYTES` a run.
    """
    b, s, h, _ = k.shape
    keys = operand(k.permute(0, 2, 3, 1))
    for run in rows.split(max(1, BYTES // (4 * b * h * s))):
        yield run, product(operand(q[:, run].transpose(1, 2)), keys)


def attention(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield runs of `rows` and their exact attention over all keys, float32 [B, H, run, keys].

    `bias` [B|1, H|1, keys]; the rest as in `logits`.
    """
    for run, found in logits(q, k, rows):
        weights = found * scale
        if bias is not None:
            weights = weights + bias[:, :, None]
        yield run, weights.softmax(-1)


def unit_mass(
    side: Side, q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the exact attention of `rows` to each unit of the grid, float32 [B, H, rows, units], text left out.

    `side` says how the keys lie, alike for all batch rows and heads, in units of as many slots each.
    """
    slots, unit = side.grid_slots, side.per * side.block
    assert slots is not None
    parts = [unit_shares(found, slots[0, 0], unit, scale, bias) for _, found in logits(q, k, rows)]
    return torch.cat(parts, 2)


def key_mass(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return each key's mean attention from the sampled rows, float32 [B, H, keys]."""
    parts = [key_shares(found, scale, bias) for _, found in logits(q, k, rows)]
    return torch.stack(parts).sum(0) / len(rows)
