"""What the tokens of one attention sequence are: text, grids of picture or video tokens, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .errors import ConfigError
from .whole import three_whole, whole


@dataclass(frozen=True)
class Text:
    """A run of text tokens; they are never dropped and never reordered, but by a recipe told to be `faithful`."""

    length: int


@dataclass(frozen=True)
class Pad:
    """A run of filler tokens a model inserts to round a length up; treated as text."""

    length: int


@dataclass(frozen=True)
class Grid:
    """A raster-ordered block of frames x height x width tokens.

    `role` is "main" for what is being generated, "reference" for conditioning pictures (Kontext) and "text" for words
    in a line that a recipe ranks like any other token.
    """

    frames: int
    height: int
    width: int
    role: Literal["main", "reference", "text"] = "main"

    @property
    def length(self) -> int:
        return self.frames * self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)


Segment = Text | Grid | Pad


@dataclass(frozen=True, init=False)
class TokenLayout:
    """An ordered tuple of segments that covers the whole sequence of one attention call.

    Either `segments`, or the short form: one `grid` of (frames, height, width) tokens and `text` tokens
    before it (`text_first=True`) or after it. Raises ConfigError on sizes below one or that are not whole.
    """

    segments: tuple[Segment, ...]

    def __init__(
        self,
        segments: Sequence[Segment] | None = None,
        *,
        grid: tuple[int, int, int] | None = None,
        text: int = 0,
        text_first: bool = True,
    ) -> None:
        if (segments is None) == (grid is None):
            raise ConfigError("TokenLayout: give either `segments` or `grid=(frames, height, width)`, not both.")
        if segments is None:
            cells: list[Segment] = [Grid(*three_whole(grid, "TokenLayout.grid", "(frames, height, width)"))]
            text = whole(text, "TokenLayout.text")
            if text < 0:
                raise ConfigError(f"TokenLayout.text: expected 0 or more tokens, got {text}.")
            words: list[Segment] = [Text(text)] if text else []
            segments = words + cells if text_first else cells + words
        elif text or not text_first:
            raise ConfigError("TokenLayout: `text` and `text_first` go with `grid`; give a Text among the `segments`.")
        if not isinstance(segments, Sequence):
            raise ConfigError(f"TokenLayout: expected a sequence of Text, Grid and Pad, got {segments!r}.")
        object.__setattr__(self, "segments", tuple(segments))
        self._check()

    def _check(self) -> None:
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise ConfigError(f"TokenLayout: a segment is a Text, Grid or Pad, got {segment!r}.")
            sizes = segment.shape if isinstance(segment, Grid) else (segment.length,)
            if any(whole(size, f"TokenLayout: {segment}") < 1 for size in sizes):
                raise ConfigError(f"TokenLayout: every size must be at least 1, got {segment}.")
        if not any(isinstance(segment, Grid) for segment in self.segments):
            raise ConfigError("TokenLayout: at least one Grid segment is needed.")

    @cached_property
    def length(self) -> int:
        """Tokens in the whole sequence."""
        return sum(segment.length for segment in self.segments)

    @property
    def main(self) -> Grid:
        """The grid that is being generated (the first with role "main")."""
        grids = [s for s in self.segments if isinstance(s, Grid)]
        return next((g for g in grids if g.role == "main"), grids[0])

    @cached_property
    def text(self) -> int:
        """Tokens that are not on a grid (text and padding)."""
        return sum(s.length for s in self.segments if not isinstance(s, Grid))

    @cached_property
    def with_text_ranked(self) -> TokenLayout:
        """The same tokens, each run of text a line of its own to be ranked like a grid; fillers stay what they are."""
        return TokenLayout([Grid(1, 1, s.length, role="text") if isinstance(s, Text) else s for s in self.segments])

    def spans(self) -> Iterator[tuple[int, Segment]]:
        """Yield (first token, segment) in sequence order."""
        start = 0
        for segment in self.segments:
            yield start, segment
            start += segment.length

    def __str__(self) -> str:
        parts = []
        for s in self.segments:
            if isinstance(s, Grid):
                size = "x".join(str(n) for n in s.shape)
                parts.append(size if s.role == "main" else f"{size} {s.role}")
            else:
                parts.append(f"{s.length} {type(s).__name__.lower()}")
        return " + ".join(parts)
