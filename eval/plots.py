"""The figures of a report as SVG and PNG bytes; matplotlib draws into memory, never on a screen."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .store import DensityMap, Row
from .summary import Standing, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cost = Callable[[Standing], float | None]
PER_COLUMN = 26  # names in a column of a legend
HEADROOM = 6  # dB above the best candidate that a plot still shows
_MARKS = {"recipe": "o", "oracle": "*", "steps": "s", "cache": "^", "floor": "x", "reference": "D"}


def quality_plot(lines: Sequence[Standing], cost: Cost, label: str) -> bytes | None:
    """Draw PSNR over a cost with prompt intervals and the Pareto front; None where fewer than two have both.

    Noise floors are horizontal lines: differences that the same weights make by themselves.
    """
    shown = [(line, c) for line in lines if "psnr" in line.figures and (c := cost(line)) is not None]
    shown = [(line, c) for line, c in shown if line.family != "floor"]
    if len(shown) < 2:
        return None
    figure, axes = _figure(7.5, 4.6)
    for name, group in _curves(shown).items():
        x, y = [c for _, c in group], [line.figures["psnr"].mean for line, _ in group]
        axes.errorbar(x, y, _bars(group), label=name, marker=_MARKS[group[0][0].family], capsize=2, linewidth=1)
    points = [(c, line.figures["psnr"].mean) for line, c in shown if line.family != "oracle"]
    front = [points[i] for i in pareto(points)]
    axes.step([c for c, _ in front], [p for _, p in front], where="post", color="0.6", linestyle=":", label="Pareto")
    _draw_floors(axes, lines, top=max(line.figures["psnr"].mean for line, _ in shown) + HEADROOM)
    axes.set_xlabel(label)
    axes.set_ylabel("PSNR against the reference, dB")
    _legend(axes)
    return _saved(figure)


def recall_plot(lines: Sequence[Standing]) -> bytes | None:
    """Draw the share of the true attention mass kept over the density, and the best that the same blocks allow."""
    shown = [line for line in lines if line.recall is not None and line.density is not None]
    if not shown:
        return None
    figure, axes = _figure(7.5, 4.2)
    pairs = [(line, line.density) for line in shown if line.density is not None]
    for name, group in _curves(pairs).items():
        x = [density for _, density in group]
        mark = _MARKS[group[0][0].family]
        (drawn,) = axes.plot(x, [line.recall for line, _ in group], marker=mark, label=name, linewidth=1)
        best = [(d, line.best_recall) for line, d in group if line.best_recall is not None]
        if best:
            axes.plot(*zip(*best, strict=True), color=drawn.get_color(), linestyle=":", linewidth=1)
    axes.set_xlabel("density of the calls that ran sparse")
    axes.set_ylabel("attention mass kept\n(dotted: best choice of the same blocks)")
    _legend(axes)
    return _saved(figure)


def error_plot(rows: Sequence[Row]) -> bytes | None:
    """Draw the relative output error of the sampled calls of some candidates, layer by layer."""
    shown = {row.candidate: row for row in rows if row.samples}
    if not shown:
        return None
    figure, axes = _figure(7.5, 4.2)
    for row in shown.values():
        sites = list(dict.fromkeys(sample.site for sample in row.samples))
        means = [float(np.mean([s.error for s in row.samples if s.site == site])) for site in sites]
        axes.plot(range(len(sites)), means, marker=".", label=row.candidate, linewidth=1)
    axes.set_xlabel("attention site, in model order")
    axes.set_ylabel("relative error of its output")
    _legend(axes)
    return _saved(figure)


def map_plot(shown: DensityMap) -> bytes:
    """Draw the density from white (none computed) to dark (dense), a pixel for each step (across) and site (down)."""
    return _shades(np.array(shown.density, dtype=float).T)


def map_scale() -> bytes:
    """Draw the colours of `map_plot` from density 0 to 1, one pixel high."""
    return _shades(np.linspace(0, 1, 101)[None])


def _shades(grid: np.ndarray) -> bytes:
    from matplotlib import colormaps

    buffer = io.BytesIO()
    Image.fromarray(colormaps["Blues"](grid, bytes=True)[..., :3]).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_floors(axes: Axes, lines: Sequence[Standing], top: float) -> None:
    """Draw noise floors as lines; those far above everything are only named, or they would flatten the rest."""
    known = [line for line in lines if line.family == "floor" and "psnr" in line.figures]
    floors = [(line.candidate, line.figures["psnr"].mean) for line in known]
    for name, psnr in floors:
        if psnr <= top:
            axes.axhline(psnr, color="0.3", linestyle="--", linewidth=0.8)
            axes.annotate(name, (0.01, psnr), xycoords=("axes fraction", "data"), size=7)
    above = ", ".join(f"{name} {psnr:.1f} dB" for name, psnr in floors if psnr > top)
    if above:
        axes.set_title(f"above: {above}", fontsize=8, loc="left")


def _curves(shown: Sequence[tuple[Standing, float]]) -> dict[str, list[tuple[Standing, float]]]:
    """Join the densities of one recipe, and the settings of one rival, into one curve."""
    curves: dict[str, list[tuple[Standing, float]]] = {}
    for line, cost in sorted(shown, key=lambda pair: pair[1]):
        separator = "@" if line.family in ("recipe", "oracle") else "-"
        curves.setdefault(line.candidate.rpartition(separator)[0] or line.candidate, []).append((line, cost))
    return curves


def _bars(group: Sequence[tuple[Standing, float]]) -> Any:
    intervals = [line.figures["psnr"] for line, _ in group]
    low = [0 if i.low is None else i.mean - i.low for i in intervals]
    high = [0 if i.high is None else i.high - i.mean for i in intervals]
    return np.clip([low, high], 0, None)


def _figure(width: float, height: float) -> tuple[Any, Axes]:
    from cycler import cycler
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=[colormaps["tab20"](i) for i in range(20)]))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Name the curves beside the plot, in as many columns as they need."""
    names = len(axes.get_legend_handles_labels()[1])
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + (names - 1) // PER_COLUMN)


def _saved(figure: Any) -> bytes:
    """Write an SVG, small: letters stay text in any font, places have two digits, and nothing stands between tags."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = re.sub(rb"(\d\.\d\d)\d+", rb"\1", buffer.getvalue())
    drawn = re.sub(rb"font-family: [^;\"]*", b"font-family: sans-serif", drawn)
    return re.sub(rb"\s+", b" ", re.sub(rb">\s+<", b"><", drawn))
