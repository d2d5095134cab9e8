"""The report of a study: one HTML file with everything inside, and the same table for the terminal and for docs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dit_accel.errors import ConfigError
from dit_accel.pipelines.compare import GAIN, difference
from dit_accel.pipelines.media import Media, encode

from . import plots
from .metrics import missing
from .modelled import RESULTS, Model, models
from .store import Row, Setup, load, open_media
from .summary import ENOUGH, Standing, standings
from .tables import Table, tables, winners

if TYPE_CHECKING:
    import rich.table

BRIEF = ("candidate", "density", "overall", "steps", "PSNR", "SSIM", "recall", "seconds")
GALLERIES = 3  # prompts whose pictures are on the page, or it would grow without end


@dataclass(frozen=True)
class Summary:
    """A study read back: its setup, its rows, a line a candidate, and what has to be said beside them."""

    path: Path
    setup: Setup
    rows: Sequence[Row]
    lines: Sequence[Standing]
    models: Sequence[Model]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, results: Path = RESULTS) -> Summary:
        """Read a file of rows and the step benchmark's results, if any. Raises ConfigError."""
        setup, rows = load(path)
        if not rows:
            raise ConfigError(f"{path}: holds no rows.")
        measured = models(results)
        notes = [*setup.notes, *missing(any(row.fps is not None for row in rows))]
        if 1 < len({row.prompt for row in rows}) < ENOUGH:
            notes.append(f"fewer than {ENOUGH} prompts: the intervals are too narrow to decide anything by")
        if not measured:
            notes.append("no modelled times: benchmarks/results holds no step_*.json of eval/bench_step.py")
        notes += [model.caveat for model in measured if model.caveat]
        return cls(path, setup, rows, standings(rows, measured, setup), measured, tuple(dict.fromkeys(notes)))

    @property
    def tables(self) -> list[Table]:
        """The ranking, a table for each asked density and each other family."""
        return tables(self.lines, self.rows, self.setup, self.models)

    @property
    def shown(self) -> list[Table]:
        """What the page and docs show: the best at each density, then all tables, without empty columns."""
        best = winners(self.lines)
        return [table.trimmed for table in ([best] if best.rows else []) + self.tables]

    def table(self) -> rich.table.Table:
        """Return the ranking for a terminal, which has no room for all columns."""
        from rich import box
        from rich.table import Table

        whole = self.tables
        shown = [i for i, title in enumerate(whole[0].columns) if title.startswith(BRIEF)]
        page = Table(title=f"{self.setup.model}, prompts: {self.prompts}", box=box.SIMPLE)
        for i in shown:
            page.add_column(whole[0].columns[i], justify="right" if i else "left", no_wrap=not i)
        for part in whole:
            for row in part.rows:
                page.add_row(*(f"[bold]{row[i].text}[/]" if row[i].best else row[i].text for i in shown))
            page.add_section()
        return page

    def markdown(self) -> str:
        """Return all tables as Markdown, with the setup and the notes below."""
        said = [self.described, *self.notes, *self.failures]
        parts = [table.markdown() for table in self.shown]
        return "\n\n".join([*parts, "\n".join(f"* {line}" for line in said)]) + "\n"

    @property
    def prompts(self) -> int:
        return len({row.prompt for row in self.rows})

    @property
    def described(self) -> str:
        """Say in one line what was run."""
        setup = self.setup
        settings = ", ".join(f"{k} {v}" for k, v in setup.settings.items() if v is not None)
        versions = ", ".join(f"{name} {version}" for name, version in setup.versions.items())
        seeds = sorted({row.seed for row in self.rows})
        return (
            f"{setup.model}, {settings}, {setup.dtype} on {setup.timed_on}; {self.prompts} prompts, seeds "
            f"{', '.join(map(str, seeds))}; of every recipe the first {setup.dense_steps:.0%} of the steps and the "
            f"first {setup.dense_layers} layers dense; {versions}"
        )

    @property
    def failures(self) -> list[str]:
        """Say which candidates gave nothing, and why."""
        return [f"{line.candidate}: {why}" for line in self.lines for why in line.failures]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the single rows as plain data."""
        return {
            "rows": str(self.path),
            "setup": self.setup.model_dump(mode="json"),
            "candidates": [line.to_dict() for line in self.lines],
            "notes": list(self.notes),
        }


def write_report(summary: Summary, output: Path) -> None:
    """Write the HTML file; one that is there already is replaced as a whole."""
    half = output.with_name(f".{output.name}.part")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        half.write_text(html(summary), encoding="utf-8")
        half.replace(output)
    finally:
        half.unlink(missing_ok=True)


def html(summary: Summary) -> str:
    """Return the report as one HTML page without links to anything outside of it."""
    import jinja2

    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    first = _first_of_each(summary.rows)
    maps = [
        {"name": row.candidate, "steps": len(row.map.density), "sites": len(row.map.sites),
         "picture": _uri(plots.map_plot(row.map), "png")}
        for row in first if row.map is not None
    ]  # fmt: skip
    return template.render(
        summary=summary,
        tables=summary.shown,
        figures=_figures(summary),
        galleries=_galleries(summary),
        maps=maps,
        scale=_uri(plots.map_scale(), "png"),
        gain=GAIN,
    )


def _figures(summary: Summary) -> list[tuple[str, str]]:
    """Return (caption, data URI) of every plot; each time axis has a plot of its own."""
    lines, device = summary.lines, summary.setup.timed_on
    found = [
        ("Quality over the pairs computed", plots.quality_plot(lines, lambda s: s.overall_density, "overall density")),
        (
            f"Quality over wall time on {device}",
            plots.quality_plot(lines, lambda s: s.seconds.mean if s.seconds else None, f"seconds on {device}"),
        ),
        *(
            (
                f"Quality over modelled time: {model.name} on {model.device}",
                plots.quality_plot(lines, lambda s, m=model: s.modelled.get(m.name), "modelled seconds of all steps"),
            )
            for model in summary.models
        ),
        ("Attention mass kept", plots.recall_plot(lines)),
        *(
            (f"Output error by layer{at}", plots.error_plot([row for row in summary.rows if row.asked == asked]))
            for asked, at in _asked(summary.rows)
        ),
    ]
    return [(caption, _svg_uri(drawn)) for caption, drawn in found if drawn is not None]


def _asked(rows: Sequence[Row]) -> list[tuple[float | None, str]]:
    """Return the densities asked for and how a caption names them, largest first, then what asks for none."""
    asked = sorted({row.asked for row in rows if row.asked is not None}, reverse=True)
    return [*((d, f", density {d:g}") for d in asked), (None, ", rules that take no density")]


def _galleries(summary: Summary) -> list[dict[str, Any]]:
    """Return for the first prompts and seeds the reference, and what each candidate made with its difference."""
    out = []
    for row in [row for row in summary.rows if row.family == "reference"][:GALLERIES]:
        reference = open_media(summary.path, row)
        if reference is None:
            continue
        same = [r for r in summary.rows if (r.prompt, r.seed) == (row.prompt, row.seed) and r is not row]
        cards = [card for r in same if (card := _card(summary.path, r, reference)) is not None]
        out.append({"prompt": row.prompt, "seed": row.seed, "reference": _shown(reference), "cards": cards})
    return out


def _card(path: Path, row: Row, reference: Media) -> dict[str, str] | None:
    media = open_media(path, row)
    if media is None or row.figures is None:
        return None
    psnr = "equal" if row.figures.psnr is None else f"{row.figures.psnr:.2f} dB"
    return {
        "name": row.candidate,
        "line": f"{psnr}, SSIM {row.figures.ssim:.4f}",
        "made": _shown(media),
        "difference": _shown(difference(reference, media)),
    }


def _shown(media: Media) -> str:
    """Return a picture or clip for the page, a third as large as without loss; rows keep it whole."""
    return _uri(encode(media, Path("shown.webp"), ""), "webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _svg_uri(drawn: bytes) -> str:
    """An SVG as text: smaller than in base 64."""
    return "data:image/svg+xml," + quote(drawn, safe=" =:/;,.()'-+*!?@&$_~[]{}|^")


def _first_of_each(rows: Sequence[Row]) -> list[Row]:
    return list({row.candidate: row for row in reversed(rows) if row.error is None}.values())[::-1]
