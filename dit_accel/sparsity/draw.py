"""Plans of videos as pictures: where one query looks, frame by frame, and how much of each frame every frame sees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..errors import PlanError
from ..layout import TokenLayout
from ..whole import three_whole
from .plan import Plan

COMPUTED, SKIPPED, QUERY, GROUND = (255, 255, 255), (48, 48, 48), (220, 30, 30), (128, 128, 128)
PER_ROW, GAP = 8, 4  # frames beside each other, pixels between them
Cell = tuple[int, int, int]


def key_maps(plan: Plan, layout: TokenLayout, query: Cell, sample: int = 0, head: int = 0) -> npt.NDArray[np.bool_]:
    """Return which tokens of the main grid one query attends to, bool [frames, height, width].

    `query` is the (frame, row, column) of a token of the main grid; all tokens of a unit share their map unless a
    predicate tells them apart. Raises ConfigError where the query is not three whole numbers, PlanError where plan,
    layout and query do not fit.
    """
    start, shape = _grid(plan, layout)
    query = _cell(query)
    if any(not 0 <= at < size for at, size in zip(query, shape, strict=True)):
        raise PlanError(f"plan: the query {query} lies outside the grid of {'x'.join(map(str, shape))} tokens.")
    row = plan.rows(torch.tensor([start + int(np.ravel_multi_index(query, shape))]), sample, head)
    return row[0, start : start + int(np.prod(shape))].cpu().numpy().reshape(shape)


def frame_density(plan: Plan, layout: TokenLayout, sample: int = 0, head: int = 0) -> npt.NDArray[np.float64]:
    """Return the share of computed pairs between the queries and the keys of two frames, [frames, frames].

    Rows are the frames of the queries, columns those of the keys, of the main grid. Raises PlanError where plan
    and layout do not fit.
    """
    start, (frames, height, width) = _grid(plan, layout)
    area = height * width
    out = np.empty((frames, frames))
    for frame in range(frames):  # one frame's rows at a time: all pairs of a long video would not fit
        first = start + frame * area
        mask = plan.rows(torch.arange(first, first + area), sample, head)[:, start : start + frames * area]
        out[frame] = mask.view(area, frames, area).double().mean((0, 2)).cpu().numpy()
    return out


def draw_frames(
    plan: Plan, layout: TokenLayout, query: Cell, *, sample: int = 0, head: int = 0, scale: int = 4
) -> Image.Image:
    """Draw the keys of one query as a strip of frames, and below it how much of each frame every frame sees.

    In the strip white tokens are computed, dark ones skipped, the query is red; a token is `scale` pixels wide. In the
    matrix a row is a frame of queries, a column a frame of keys, from black (no pair computed) to white (all), a cell
    `4 * scale` pixels wide. Text keys, which all queries see, are not shown. Raises as `key_maps`.
    """
    strip = _strip(key_maps(plan, layout, query, sample, head), _cell(query), scale)
    density = np.rint(frame_density(plan, layout, sample, head) * 255).astype(np.uint8)
    matrix = _enlarged(density[..., None].repeat(3, -1), 4 * scale)
    page = Image.new("RGB", (max(strip.width, matrix.width + 2 * GAP), strip.height + matrix.height + GAP), GROUND)
    page.paste(strip, (0, 0))
    page.paste(matrix, (GAP, strip.height))
    return page


def _strip(maps: npt.NDArray[np.bool_], query: Cell, scale: int) -> Image.Image:
    colours = np.where(maps[..., None], np.array(COMPUTED, np.uint8), np.array(SKIPPED, np.uint8))
    colours[query] = QUERY
    columns = min(PER_ROW, len(maps))
    rows = -(-len(maps) // columns)
    height, width = (n * scale + GAP for n in maps.shape[1:])
    strip = Image.new("RGB", (columns * width + GAP, rows * height + GAP), GROUND)
    for i, frame in enumerate(colours):
        strip.paste(_enlarged(frame, scale), (GAP + i % columns * width, GAP + i // columns * height))
    return strip


def _enlarged(pixels: npt.NDArray[np.uint8], factor: int) -> Image.Image:
    return Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1))


def _cell(query: Cell) -> Cell:
    return three_whole(query, "query", "(frame, row, column)")


def _grid(plan: Plan, layout: TokenLayout) -> tuple[int, Cell]:
    if not plan.queries == plan.keys == layout.length:
        raise PlanError(
            f"plan: it has {plan.queries} queries and {plan.keys} keys, the layout {layout} has {layout.length} tokens."
        )
    start = next(start for start, segment in layout.spans() if segment is layout.main)
    return start, layout.main.shape
