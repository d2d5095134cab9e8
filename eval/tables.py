"""The ranking as tables: one for each asked density, best first and marked; rivals, oracle and floors apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .modelled import Model
from .store import Row, Setup
from .summary import LOWER_IS_BETTER, Interval, Standing, by_candidate, paired, rank

FAIR = 1.2  # times the asked density that a candidate may compute and still be the best at it
TITLES = {
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "ms_ssim": ("MS-SSIM", 4),
    "flip": ("FLIP", 4),
    "temporal_error": ("temporal error", 2),
    "vmaf": ("VMAF", 2),
}
OTHERS = {"oracle": "Oracle", "steps": "Fewer steps", "cache": "Caches", "floor": "Noise floors"}
ABOVE, ALIKE, FEWER = "†", "≈", "‡"
SAID = {
    ABOVE: f"{ABOVE} computes more than {FAIR:g} times what was asked, so the best is not chosen from it",
    ALIKE: f"{ALIKE} not told apart from the best PSNR: the paired difference over prompts may be 0 (95 % interval)",
    FEWER: f"{FEWER} over fewer prompts than others here, so its means do not compare with theirs",
}


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table, and whether it is the best of its column."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its title, its column titles, a row of cells for each candidate, and what its marks mean."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def trimmed(self) -> Table:
        """The table without columns in which nothing stands."""
        kept = [i for i in range(len(self.columns)) if any(row[i].text for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
        )

    def markdown(self) -> str:
        """Return heading, table and notes as Markdown, the best of each column in bold."""
        lines = [" | ".join(self.columns), "|".join(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [" | ".join(f"**{cell.text}**" if cell.best else cell.text for cell in row) for row in self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {line} |" for line in lines), *self._notes()])

    def _notes(self) -> list[str]:
        return ["", *(f"{note}  " for note in self.notes)] if self.notes else []


@dataclass(frozen=True)
class _Column:
    title: str
    text: Callable[[Standing], str]
    value: Callable[[Standing], float | None] | None = None  # what the best is chosen by
    lower: bool = False


def tables(lines: Sequence[Standing], rows: Sequence[Row], setup: Setup, models: Sequence[Model]) -> list[Table]:
    """Return the reference, recipes by asked density, largest first, then everything else, family by family."""
    columns, grouped = _columns(setup, models), by_candidate(rows)
    out = []
    for title, group in _sections(lines):
        ranked = group[0].asked is not None and group[0].family == "recipe"
        out.append(_table(title, group, columns, grouped if ranked else {}))
    return out


def _sections(lines: Sequence[Standing]) -> Iterator[tuple[str, list[Standing]]]:
    def of(family: str) -> list[Standing]:
        return sorted((line for line in lines if line.family == family), key=rank, reverse=True)

    recipes = of("recipe")
    asked = sorted({line.asked for line in recipes if line.asked is not None}, reverse=True)
    sections = [("Reference", of("reference"))]
    sections += [(f"Density {d:g}", [line for line in recipes if line.asked == d]) for d in asked]
    sections += [("Rules that take no density", [line for line in recipes if line.asked is None])]
    sections += [(title, of(family)) for family, title in OTHERS.items()]
    return ((title, group) for title, group in sections if group)


def winners(lines: Sequence[Standing]) -> Table:
    """Say in one table which fair recipe is best at each density, beside the oracle."""
    oracle = {line.asked: line for line in lines if line.family == "oracle"}
    found = []
    for title, group in _sections(lines):
        best = best_of(group) if group[0].family == "recipe" and group[0].asked is not None else None
        if best is not None:
            psnr = _figure("psnr").text
            other = oracle.get(best.asked)
            texts = (title, best.candidate, psnr(best), _number(best.spent, 3), psnr(other) if other else "")
            found.append(tuple(Cell(text) for text in texts))
    return Table("The best at each density", ("asked", "best", "PSNR dB", "spent", "oracle's PSNR dB"), tuple(found))


def is_fair(line: Standing) -> bool:
    """Say whether a candidate computes no more than a little above what was asked, as far as is known."""
    return line.asked is None or line.spent is None or line.spent <= FAIR * line.asked


def best_of(group: Sequence[Standing]) -> Standing | None:
    """Return the fair candidate of the best PSNR, None where none made a picture."""
    fair = [line for line in group if is_fair(line) and (line.equal or "psnr" in line.figures)]
    return max(fair, key=rank, default=None)


def _table(
    title: str, group: Sequence[Standing], columns: Sequence[_Column], rows: Mapping[str, Sequence[Row]]
) -> Table:
    """Fill one table; with `rows` the best of each column is marked, and what is like the best or unfair."""
    best = best_of(group) if rows and len(group) > 1 else None
    alike = {line.candidate for line in group if best is not None and _is_alike(line, best, rows)}
    top = {column.title: _top(column, group) for column in columns} if best is not None else {}
    most = max(line.prompts for line in group)
    cells, used = [], []
    for line in group:
        row = [Cell(column.text(line), line.candidate in top.get(column.title, ())) for column in columns]
        marks = (
            (ABOVE, "spent", not is_fair(line)),
            (ALIKE, "PSNR dB", line.candidate in alike),
            (FEWER, "candidate", 0 < line.prompts < most),
        )
        for mark, where, holds in marks:
            if holds:
                at = next(i for i, column in enumerate(columns) if column.title == where)
                row[at] = replace(row[at], text=f"{row[at].text} {mark}")
                used.append(mark)
        cells.append(tuple(row))
    notes = tuple(text for mark, text in SAID.items() if mark in used)
    return Table(title, tuple(column.title for column in columns), tuple(cells), notes)


def _is_alike(line: Standing, best: Standing, rows: Mapping[str, Sequence[Row]]) -> bool:
    if line is best or not is_fair(line):
        return False
    apart = paired(rows[line.candidate], rows[best.candidate])
    return apart is not None and apart.low is not None and apart.high is not None and apart.low <= 0 <= apart.high


def _top(column: _Column, group: Sequence[Standing]) -> set[str]:
    """Name the fair candidates that are best in a column."""
    if column.value is None:
        return set()
    known = {line.candidate: v for line in group if is_fair(line) and (v := column.value(line)) is not None}
    wanted = (min if column.lower else max)(known.values(), default=None)
    return {name for name, value in known.items() if value == wanted}


def _columns(setup: Setup, models: Sequence[Model]) -> list[_Column]:
    return [
        _Column("candidate", lambda line: line.candidate),
        _Column("density", lambda line: _number(line.density, 3)),
        _Column("spent", lambda line: _number(line.spent, 3)),
        _Column("overall", lambda line: _number(line.overall_density, 3)),
        _Column("steps", lambda line: _number(line.steps, 0)),
        *(_figure(name) for name in TITLES),
        _Column("recall", lambda line: _number(line.recall, 4), lambda line: line.recall),
        _Column("best recall", lambda line: _number(line.best_recall, 4)),
        _Column("output error", lambda line: _number(line.error, 4), lambda line: line.error, lower=True),
        _Column(f"seconds ({setup.timed_on})", lambda line: _interval(line.seconds, 2), _seconds, lower=True),
        *(
            _Column(f"modelled s ({m.name}, {m.device})", lambda line, m=m: _number(line.modelled.get(m.name), 1))
            for m in models
        ),
        _Column("peak MiB", lambda line: _number(None if line.peak_bytes is None else line.peak_bytes / 2**20, 0)),
    ]


def _figure(name: str) -> _Column:
    title, digits = TITLES[name]

    def text(line: Standing) -> str:
        return "equal" if name == "psnr" and line.equal else _interval(line.figures.get(name), digits)

    def value(line: Standing) -> float | None:
        if name == "psnr":
            return rank(line) if line.equal or name in line.figures else None
        return line.figures[name].mean if name in line.figures else None

    return _Column(title, text, value, name in LOWER_IS_BETTER)


def _seconds(line: Standing) -> float | None:
    return line.seconds.mean if line.seconds else None


def _interval(value: Interval | None, digits: int) -> str:
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
