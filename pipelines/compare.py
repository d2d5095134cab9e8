"""Two pictures or clips against each other: PSNR, SSIM, temporal error, and a sheet with labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .media import Media

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


def temporal_error(a: Media, b: Media) -> float | None:
    """Return how differently two clips change from frame to frame, in grey levels of 255; None for one frame.

    The root mean square, over all pixels, colours and pairs of neighbouring frames, of the difference between
    a's change and b's change, `(a[t+1] - a[t]) - (b[t+1] - b[t])`. 0: they move alike, though they may differ by
    something that stands still; flicker and jerks that only one of them has count in full.
    """
    errors = (x - y for x, y in (_pair(*frames) for frames in _frames(a, b)))
    previous, total, count = next(errors), 0.0, 0
    for error in errors:
        total += float(np.mean((error - previous) ** 2))
        previous, count = error, count + 1
    return math.sqrt(total / count) if count else None


@dataclass(frozen=True)
class Likeness:
    """How alike two pictures or clips are, frame by frame.

    A frame's PSNR is None where the frames are equal, since infinity is no JSON; `psnr` is the mean over the frames
    that differ, None where none does.
    """

    frame_psnr: tuple[float | None, ...]
    frame_ssim: tuple[float, ...]
    temporal_error: float | None = None

    @classmethod
    def of(cls, a: Media, b: Media) -> Likeness:
        """Compare two pictures, or two clips of as many frames; ValueError where sizes or numbers differ."""
        ratios = [psnr(*frames) for frames in _frames(a, b)]
        finite = tuple(ratio if math.isfinite(ratio) else None for ratio in ratios)
        return cls(finite, tuple(ssim(*frames) for frames in _frames(a, b)), temporal_error(a, b))

    @property
    def psnr(self) -> float | None:
        return float(np.mean(self._differing)) if self._differing else None

    @property
    def psnr_min(self) -> float | None:
        return min(self._differing, default=None)

    @property
    def ssim(self) -> float:
        return float(np.mean(self.frame_ssim))

    @property
    def ssim_min(self) -> float:
        return min(self.frame_ssim)

    @property
    def _differing(self) -> list[float]:
        return [ratio for ratio in self.frame_psnr if ratio is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data, those of single frames only for clips."""
        data: dict[str, Any] = {"psnr": self.psnr, "ssim": self.ssim}
        if len(self.frame_ssim) > 1:
            data |= {"psnr_min": self.psnr_min, "ssim_min": self.ssim_min, "temporal_error": self.temporal_error}
            data |= {"frame_psnr": list(self.frame_psnr), "frame_ssim": list(self.frame_ssim)}
        return data

    def __str__(self) -> str:
        if self.psnr is None:
            return "equal frames" if len(self.frame_ssim) > 1 else "equal pictures"
        text = f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}"
        return text if self.temporal_error is None else f"{text}, temporal error {self.temporal_error:.1f}"


def difference(a: Media, b: Media) -> Media:
    """Return the absolute difference of two pictures or clips, GAIN times brighter."""
    return Media(tuple(_difference(*frames) for frames in _frames(a, b)), a.fps)


@dataclass(frozen=True)
class Cell:
    """One picture or clip of a sheet and the lines under it."""

    media: Media
    lines: Sequence[str]


def sheet(rows: Sequence[Sequence[Cell]]) -> Media:
    """Lay pictures and clips out in rows, each with its lines below; small ones are enlarged to be seen.

    With a clip among them the sheet is a clip as long as the longest; what is shorter stays on its last frame.
    """
    cells = [cell.media for row in rows for cell in row]
    length = max(len(media.frames) for media in cells)
    fps = max((media.fps for media in cells if media.fps is not None), default=None)
    return Media(tuple(_page(rows, i) for i in range(length)), fps)


def _page(rows: Sequence[Sequence[Cell]], frame: int) -> Image.Image:
    drawn = [[_draw(cell, frame) for cell in row] for row in rows]
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


def _draw(cell: Cell, frame: int) -> Image.Image:
    image = cell.media.frames[min(frame, len(cell.media.frames) - 1)].convert("RGB")
    factor = max(1, _CELL // image.width)
    picture = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default(size=13)
    width = max(picture.width, *(math.ceil(font.getlength(line)) for line in cell.lines))
    card = Image.new("RGB", (width, picture.height + _LINE * len(cell.lines) + _GAP), "white")
    card.paste(picture, (0, 0))
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(cell.lines):
        draw.text((0, picture.height + 4 + i * _LINE), line, fill="black", font=font)
    return card


def _difference(a: Image.Image, b: Image.Image) -> Image.Image:
    x, y = _pair(a, b)
    return Image.fromarray(np.clip(np.abs(x - y) * GAIN, 0, 255).astype(np.uint8))


def _frames(a: Media, b: Media) -> Iterator[tuple[Image.Image, Image.Image]]:
    if len(a.frames) != len(b.frames):
        raise ValueError(f"clips of {len(a.frames)} and {len(b.frames)} frames cannot be compared")
    return zip(a.frames, b.frames, strict=True)


def _pair(a: Image.Image, b: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if a.size != b.size:
        raise ValueError(f"pictures of {a.size} and {b.size} pixels cannot be compared")
    return np.asarray(a.convert("RGB"), np.float64), np.asarray(b.convert("RGB"), np.float64)


def _blur(x: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(x, (11, 11), 1.5)
