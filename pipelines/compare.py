"""Two pictures against each other: PSNR, SSIM, and a sheet with labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAIN = 4
_CELL, _GAP, _LINE = 256, 8, 18


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB; infinite where they are equal."""
    x, y = _pair(a, b)
    error = float(np.mean((x - y) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Return the structural similarity of two pictures: 1 where they are equal, about 0 where unrelated.

    Wang, Bovik, Sheikh and Simoncelli 2004: an 11 x 11 Gaussian window of sigma 1.5, K = 0.01 and 0.03, mean
    over the red, green and blue maps without their border of 5 pixels (which pictures below 11 pixels keep).
    """
    x, y = _pair(a, b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    inner = score[5:-5, 5:-5] if min(score.shape[:2]) > 10 else score
    return float(inner.mean())


@dataclass(frozen=True)
class Likeness:
    """How alike two pictures are; `psnr` is None where they are equal, since infinity is no JSON."""

    psnr: float | None
    ssim: float

    @classmethod
    def of(cls, a: Image.Image, b: Image.Image) -> Likeness:
        """Compare two pictures."""
        ratio = psnr(a, b)
        return cls(ratio if math.isfinite(ratio) else None, ssim(a, b))

    def __str__(self) -> str:
        return "equal pictures" if self.psnr is None else f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}"


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """Return the absolute difference of two pictures, GAIN times brighter."""
    x, y = _pair(a, b)
    return Image.fromarray(np.clip(np.abs(x - y) * GAIN, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet and the lines under it."""

    image: Image.Image
    lines: Sequence[str]


def sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Lay pictures out in rows, each with its lines below; small ones are enlarged to be seen."""
    drawn = [[_draw(cell) for cell in row] for row in rows]
    widths = [sum(cell.width + _GAP for cell in row) + _GAP for row in drawn]
    heights = [max(cell.height for cell in row) + _GAP for row in drawn]
    page = Image.new("RGB", (max(widths), sum(heights) + _GAP), "white")
    top = _GAP
    for row, height in zip(drawn, heights, strict=True):
        left = _GAP
        for cell in row:
            page.paste(cell, (left, top))
            left += cell.width + _GAP
        top += height
    return page


def _draw(cell: Cell) -> Image.Image:
    factor = max(1, _CELL // cell.image.width)
    picture = cell.image.convert("RGB").resize(
        (cell.image.width * factor, cell.image.height * factor), Image.Resampling.NEAREST
    )
    font = ImageFont.load_default(size=13)
    width = max(picture.width, *(math.ceil(font.getlength(line)) for line in cell.lines))
    card = Image.new("RGB", (width, picture.height + _LINE * len(cell.lines) + _GAP), "white")
    card.paste(picture, (0, 0))
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(cell.lines):
        draw.text((0, picture.height + 4 + i * _LINE), line, fill="black", font=font)
    return card


def _pair(a: Image.Image, b: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if a.size != b.size:
        raise ValueError(f"pictures of {a.size} and {b.size} pixels cannot be compared")
    return np.asarray(a.convert("RGB"), np.float64), np.asarray(b.convert("RGB"), np.float64)


def _blur(x: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(x, (11, 11), 1.5)
