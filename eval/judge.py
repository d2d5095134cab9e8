"""A mixture against the best single recipe at each density, on prompts it was not chosen by, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.config import Mixtures
from dit_accel.errors import ConfigError

from .store import Row, Setup, load
from .summary import ENOUGH, Interval, Standing, by_candidate, paired, standings
from .tables import best_of, is_fair

if TYPE_CHECKING:
    import rich.table

FIGURES = ("psnr", "ssim")


@dataclass(frozen=True)
class Against:
    """A mixture beside one recipe: by how much its figures are above, in the mean over prompts."""

    rival: str
    ahead: Mapping[str, Interval]

    def __str__(self) -> str:
        psnr = self.ahead.get("psnr")
        if psnr is None:
            return f"no prompt where both {self.rival} and it differ from the reference"
        if psnr.low is None or psnr.high is None:
            return f"one prompt, {_signed(psnr.mean)} dB against {self.rival}: that decides nothing"
        ssim = f", SSIM {self.ahead['ssim'].mean:+.4f}" if "ssim" in self.ahead else ""
        said = f"{_signed(psnr.mean)} dB ({_signed(psnr.low)} to {_signed(psnr.high)}){ssim} against {self.rival}"
        if psnr.prompts < ENOUGH:
            return f"{psnr.prompts} prompts, fewer than the {ENOUGH} that can decide: {said}"
        if psnr.low > 0:
            return f"better: {said}"
        return f"worse: {said}" if psnr.high < 0 else f"not told apart: {said}"


@dataclass(frozen=True)
class Verdict:
    """One density: what the mixture computed, and how it stands against two single recipes.

    `best_here`: the best on these very rows, which is the hardest rival, since it is picked after the fact.
    `best_there`: the one that was best where the mixture was chosen, which one would have used without a mixture.
    """

    density: float
    candidate: str
    spent: float | None
    fair: bool
    best_here: Against | None
    best_there: Against | None


@dataclass(frozen=True)
class Judgement:
    """All verdicts on one mixture, and what they rest on."""

    name: str
    chosen_on: str
    judged_on: str
    prompts: int
    left_out: int
    verdicts: tuple[Verdict, ...]

    @property
    def described(self) -> str:
        """Say in one line what was judged on what."""
        left = f"; {self.left_out} prompts left out because the choice had seen them" if self.left_out else ""
        return f"{self.name}, chosen on {self.chosen_on}, judged on {self.judged_on}, prompts: {self.prompts}{left}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)

    def table(self) -> rich.table.Table:
        """Return the verdicts for a terminal."""
        from rich import box
        from rich.table import Table

        page = Table(title=self.described, box=box.SIMPLE)
        for title in TITLES:
            page.add_column(title)
        for verdict in self.verdicts:
            page.add_row(*_cells(verdict))
        return page

    def markdown(self) -> str:
        """Return the verdicts as Markdown."""
        lines = [" | ".join(TITLES), "|".join(["---"] * len(TITLES)), *(" | ".join(_cells(v)) for v in self.verdicts)]
        return "\n".join([*(f"| {line} |" for line in lines), "", f"* {self.described}", ""])


TITLES = (
    "density",
    "spent",
    "against the best single recipe here",
    "against the one that was best where it was chosen",
)


def judge(mixtures: Mixtures, rows: Path) -> Judgement:
    """Hold a mixture's rows of a study against those of its single recipes, without the prompts it was chosen by.

    Raises ConfigError where the rows hold nothing of the mixture, or no other prompt.
    """
    setup, found = load(rows)
    seen = set(mixtures.chosen.prompts)
    fresh = [row for row in found if row.prompt not in seen]
    if not fresh:
        raise ConfigError(f"{rows}: every prompt of it was used to choose {mixtures.name}; judge it by others.")
    groups = by_candidate(fresh)
    lines = {line.candidate: line for line in standings(fresh, (), setup)}
    verdicts = [_verdict(mixtures, recipe.total, groups, lines, setup) for recipe in mixtures.recipes if recipe.total]
    given = tuple(verdict for verdict in verdicts if verdict is not None)
    if not given:
        raise ConfigError(f"{rows}: holds no row of {mixtures.name}; run eval with --recipe and its file first.")
    return Judgement(
        name=mixtures.name,
        chosen_on=mixtures.chosen.model,
        judged_on=setup.model,
        prompts=len({row.prompt for row in fresh}),
        left_out=len({row.prompt for row in found} & seen),
        verdicts=given,
    )


def _verdict(
    mixtures: Mixtures,
    density: float,
    groups: Mapping[str, Sequence[Row]],
    lines: Mapping[str, Standing],
    setup: Setup,
) -> Verdict | None:
    name = f"{mixtures.name}@{density:g}"
    if name not in groups:
        return None
    _check_same(mixtures, density, groups[name][0], setup)
    single = [
        line
        for line in lines.values()
        if line.family == "recipe"
        and line.asked == density
        and groups[line.candidate][0].definition.get("total") is None
    ]
    best = best_of(single)
    there = next((one for one in mixtures.chosen.best if one.endswith(f"@{density:g}") and one in groups), None)
    return Verdict(
        density=density,
        candidate=name,
        spent=lines[name].spent,
        fair=is_fair(lines[name]),
        best_here=None if best is None else _against(groups, name, best.candidate),
        best_there=None if there is None else _against(groups, name, there),
    )


def _check_same(mixtures: Mixtures, density: float, row: Row, setup: Setup) -> None:
    """Refuse rows of another mixture of the same name."""
    asked = mixtures.at(density).override(
        dense_steps=setup.dense_steps, dense_layers=setup.dense_layers, adaptive=False
    )
    if asked.model_dump(mode="json")["cases"] != row.definition.get("cases"):
        raise ConfigError(f"{row.candidate}: these rows are of another mixture of that name; name yours otherwise.")


def _against(groups: Mapping[str, Sequence[Row]], name: str, rival: str) -> Against:
    found = {figure: paired(groups[name], groups[rival], figure) for figure in FIGURES}
    return Against(rival, {figure: interval for figure, interval in found.items() if interval is not None})


def _cells(verdict: Verdict) -> list[str]:
    spent = "" if verdict.spent is None else f"{verdict.spent:.3f}{'' if verdict.fair else ' (more than asked)'}"
    return [f"{verdict.density:g}", spent, str(verdict.best_here or ""), str(verdict.best_there or "")]


def _signed(value: float) -> str:
    return f"{value:+.2f}"
