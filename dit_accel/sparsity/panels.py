"""Panels of numbers as pictures: maps over block pairs, maps over the grid, and a page of them with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .draw import COMPUTED, QUERY, SKIPPED, Cell

Numbers = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

PANEL, GAP, LINE = 160, 8, 18  # pixels: a panel's side, between panels, a line of text
SPAN = 4  # powers of two that colours show below and above even attention
MOST = 2**SPAN
GROUND = (214, 214, 214)
_HEAT = ((6, 8, 34), (72, 22, 110), (178, 52, 92), (244, 138, 48), (253, 250, 196))  # dark to bright, evenly spaced


def share_colours(shares: Numbers) -> Pixels:
    """Return colours for shares in 0..1, uint8 [..., 3]: dark where nothing is computed, white where all is."""
    return _between(shares, (SKIPPED, COMPUTED))


def mass_colours(times_even: Numbers) -> Pixels:
    """Return colours for attention as a multiple of even attention, uint8 [..., 3], a step of brightness a doubling."""
    powers = np.log2(np.maximum(times_even, 2.0 ** -(SPAN + 1)))
    return _between((powers + SPAN) / (2 * SPAN), _HEAT)


def block_map(colours: Pixels) -> Image.Image:
    """Return a map over block pairs, colours [query blocks, key blocks, 3], as a square panel."""
    shrinks = max(colours.shape[:2]) > PANEL
    return Image.fromarray(colours).resize(
        (PANEL, PANEL), Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    )


def grid_map(colours: Pixels, query: Cell) -> Image.Image:
    """Return a map over the grid, colours [frames, height, width, 3], its frames in rows, the query marked."""
    frames, height, width, _ = colours.shape
    marked = colours.copy()
    marked[query] = QUERY
    columns = min(frames, max(1, round(math.sqrt(frames * height / width))))
    rows = -(-frames // columns)
    scale = max(1, PANEL // max(columns * width, rows * height))
    apart = scale if frames > 1 else 0
    size = columns * (width * scale + apart) - apart, rows * (height * scale + apart) - apart
    page = Image.new("RGB", size, GROUND)
    for i, frame in enumerate(marked):
        picture = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
        page.paste(picture, (i % columns * (picture.width + apart), i // columns * (picture.height + apart)))
    return page


def page(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Lay rows of panels below each other, the caption of each above it."""
    font = ImageFont.load_default(size=13)
    heights = [LINE + max((p.height + GAP for p in panels), default=0) for _, panels in rows]
    widths = [
        max(math.ceil(font.getlength(caption)) + 2 * GAP, GAP + sum(p.width + GAP for p in panels))
        for caption, panels in rows
    ]
    whole = Image.new("RGB", (max(widths), sum(heights) + GAP), GROUND)
    draw, top = ImageDraw.Draw(whole), GAP // 2
    for (caption, panels), height in zip(rows, heights, strict=True):
        draw.text((GAP, top), caption, fill="black", font=font)
        left = GAP
        for panel in panels:
            whole.paste(panel, (left, top + LINE))
            left += panel.width + GAP
        top += height
    return whole


def _between(values: Numbers, stops: Sequence[tuple[int, int, int]]) -> Pixels:
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(values, at, [stop[c] for stop in stops]) for c in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)
