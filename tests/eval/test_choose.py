"""Mixtures: the best picks against every combination, where each pick ends up in a model, and what judges them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import error_of, files
from typer.testing import Result

import dit_accel
from dit_accel.config import MAPPED, Choice, Mixtures, Recipe, build, read_file, write_file
from dit_accel.errors import ConfigError
from dit_accel.eval.cells import (
    FULL,
    GRAIN,
    Cell,
    Course,
    Group,
    Mixed,
    Option,
    best_mix,
    cheapest,
    groups_of,
    knapsack,
    uniform,
)
from dit_accel.eval.choose import Chosen, as_recipe
from dit_accel.eval.judge import judge
from dit_accel.eval.store import DensityMap, Figures, Row, Sample, Setup, Store
from dit_accel.sparsity.recipes import resolve

SITES, STEPS, DENSE_STEPS = 8, 10, 0.2
SETUP = Setup(
    model="m", settings={"steps": STEPS}, dtype="float32", device="cpu, 1 threads", dense_steps=DENSE_STEPS,
    dense_layers=0, versions={},
)  # fmt: skip
CHOICE = Choice(model="m", described="small", prompts=("a",), candidates=("draft@0.3",), best=("draft@0.3",))


# -- the best picks ---
def random_groups(make: random.Random, count: int, windows: int = 2) -> list[Group]:
    """Return groups and windows of random shares with random options, costs in whole grains."""
    shares = [make.randint(1, 5) for _ in range(count)]
    groups = []
    for at, share in enumerate(shares):
        cells = []
        for window in range(windows):
            options = [Option(f"{at}-{window}-{i}", None, make.randint(1, 20) / 20, make.random()) for i in range(3)]
            span = (window / windows, (window + 1) / windows)
            cells.append(Cell(span, 1 / windows, (*options, Option(FULL, None, 1.0, 0.0))))
        groups.append(Group((at / count, (at + 1) / count), share / sum(shares), tuple(cells)))
    return groups


def every_mix(groups: list[Group]) -> list[Mixed]:
    each = [
        [Course(group, picks) for picks in itertools.product(*(cell.options for cell in group.cells))]
        for group in groups
    ]
    return [Mixed(courses) for courses in itertools.product(*each)]


@pytest.mark.parametrize("seed", range(6))
def test_the_picks_are_the_best_of_all_that_fit(seed: int) -> None:
    print("seed", seed)
    groups = random_groups(random.Random(seed), 3)
    every, slack = every_mix(groups), (len(groups) + 1) / GRAIN  # each cost is rounded to a grain
    for budget in (0.25, 0.5, 0.8, 1.0):
        fitting = [mixed.loss for mixed in every if mixed.cost <= budget - slack]
        if not fitting:
            assert cheapest(groups) > budget - slack
            continue
        found = knapsack(groups, budget)
        assert found.cost <= budget + slack
        assert min(mixed.loss for mixed in every if mixed.cost <= budget + slack) <= found.loss <= min(fitting)


def test_errors_add_up_in_time_and_not_in_depth() -> None:
    """Two windows of errors 0.2 and 0.4 lose their mean, squared; two groups lose the mean of their losses."""
    options = (Option("a", None, 0.3, 0.2), Option("b", None, 0.5, 0.4))
    cells = (Cell((0.0, 0.5), 0.5, options), Cell((0.5, 1.0), 0.5, options))
    first, second = Group((0.0, 0.25), 0.25, cells), Group((0.25, 1.0), 0.75, cells)
    mixed = Mixed((Course(first, options), Course(second, options[:1] * 2)))
    assert mixed.loss == pytest.approx(0.25 * 0.3**2 + 0.75 * 0.2**2)
    assert mixed.cost == pytest.approx(0.25 * 0.4 + 0.75 * 0.3)


def test_with_room_for_everything_everything_is_computed() -> None:
    found = knapsack(random_groups(random.Random(0), 4), 1.0)
    assert {pick.name for course in found.courses for pick in course.picks} == {FULL}


def test_a_single_recipe_is_kept_where_mixing_promises_little() -> None:
    def groups(gain: float) -> list[Group]:
        special = Option("special", None, 0.3, 0.2 * gain)
        plain = Option("plain", None, 0.3, 0.2)
        return [
            Group((0.0, 0.5), 0.5, (Cell((0.0, 1.0), 1.0, (plain, special)),)),
            Group((0.5, 1.0), 0.5, (Cell((0.0, 1.0), 1.0, (plain,)),)),
        ]

    chosen = [[course.picks[0].name for course in best_mix(groups(gain), 0.3).courses] for gain in (0.95, 0.5)]
    assert chosen == [["plain", "plain"], ["special", "plain"]]


def test_a_density_below_the_cheapest_is_refused() -> None:
    groups = [Group((0.0, 1.0), 1.0, (Cell((0.0, 1.0), 1.0, (Option("a", None, 0.2, 0.5),)),))]
    with pytest.raises(ConfigError, match=r"density 0\.1: the cheapest choices measured take 0\.200"):
        best_mix(groups, 0.1)


# -- from rows to cells ---
def looked_into(name: str, asked: float, error: Callable[[int, int], float], full: tuple[int, ...] = ()) -> list[Row]:
    """Return a row of a recipe whose calls compute `asked` after two dense steps, everything at the steps `full`."""
    names = [f"blocks.{i}" for i in range(SITES)]
    density = [[1.0 if step < 2 or step in full else asked] * SITES for step in range(STEPS)]
    samples = [
        Sample(step=step, site=site, density=density[step][i], recall=0.5, best_recall=None, error=error(i, step))
        for i, site in enumerate(names)
        for step in (2, 4, 6, 9)
    ]
    recipe = resolve(name, density=asked).override(dense_steps=DENSE_STEPS)
    row = Row(
        candidate=f"{name}@{asked:g}", family="recipe", definition=recipe.model_dump(mode="json"), prompt="a", seed=0,
        asked=asked, steps=STEPS, figures=Figures(psnr=20, ssim=0.9), samples=tuple(samples),
        map=DensityMap(sites=tuple(names), density=tuple(map(tuple, density))),
    )  # fmt: skip
    return [row]


def test_parts_hold_means_over_their_calls() -> None:
    rows = {"draft@0.3": looked_into("draft", 0.3, lambda site, step: 0.1 * (site + 1) + (0.5 if step == 9 else 0))}
    groups = groups_of(rows, SETUP, 4, 2)
    assert [group.depth for group in groups] == [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]
    assert [cell.steps for cell in groups[0].cells] == [(0.0, 0.6), (0.6, 1.0)]
    assert [group.share for group in groups] == [0.25] * 4
    assert [cell.share for cell in groups[3].cells] == [0.5] * 2
    early, late = (cell.options for cell in groups[0].cells)  # sites 0 and 1, looked at in steps 2, 4 and in 6, 9
    assert early[0] == Option(FULL, None, 1.0, 0.0)
    assert (early[1].cost, early[1].error) == (pytest.approx(0.3), pytest.approx(((0.1**2 + 0.2**2) / 2) ** 0.5))
    assert late[1].error == pytest.approx(((0.1**2 + 0.2**2 + 0.6**2 + 0.7**2) / 4) ** 0.5)


def test_steps_computed_in_full_cost_and_err_nothing() -> None:
    """A recipe with full steps is no bargain because one of them happened to be looked at."""
    rows = {"rettention@0.3": looked_into("rettention", 0.3, lambda site, step: 0.4, full=(4, 9))}
    first, second = groups_of(rows, SETUP, 1, 2)[0].cells
    assert [cell.options[1].cost for cell in (first, second)] == [pytest.approx((3 * 0.3 + 1) / 4)] * 2
    assert first.options[1].error == pytest.approx((0.75 * 0.4**2) ** 0.5)
    rows = {"rettention@0.3": looked_into("rettention", 0.3, lambda site, step: 0.4, full=(6, 9))}
    unseen = groups_of(rows, SETUP, 1, 2)
    assert [option.name for option in unseen[0].cells[1].options] == [FULL]  # nothing sparse was seen
    assert list(uniform(unseen)) == [FULL]


# -- from picks to a recipe ---
def test_every_site_and_step_gets_its_pick_in_models_of_any_depth() -> None:
    """Also where a recipe has cases of its own, keeps decisions, or corrects; joined cells included."""
    names = ("draft@0.3", "draft@0.3", "vmoba@0.3", FULL, "svg-ear@0.2", "dfs@0.5", "svg1@0.4", "draft@0.3")
    options = tuple(Option(name, None if name == FULL else plain(name), 0.3, 0.1) for name in names)
    courses = []
    for g in range(4):
        cells = tuple(Cell(span, 0.5, options) for span in ((0.0, 0.6), (0.6, 1.0)))
        courses.append(Course(Group((g / 4, (g + 1) / 4), 0.25, cells), options[2 * g : 2 * g + 2]))
    mixture = as_recipe(Mixed(tuple(courses)), 0.3, "auto", CHOICE)
    assert mixture.density == 0.3
    assert "mixture of draft, vmoba, dense, svg-ear, dfs, svg1 (small, prompts: 1), chosen on m" in mixture.sources[0]
    assert len([case for case in mixture.cases if case.name == "draft@0.3"]) == 2  # two windows joined
    for sites in (4, 7, 30):
        for site in range(sites):
            for step in range(STEPS):
                at = next(i for i in range(4) if i / 4 <= site / sites < (i + 1) / 4)
                pick = options[2 * at + (step / STEPS >= 0.6)]
                got = mixture.at(site, sites, step / STEPS)
                if pick.recipe is None:
                    assert got.select.kind == "all"
                    assert got.heads is got.correct is None
                    continue
                expected = pick.recipe.at(site, sites, step / STEPS)
                for name in MAPPED:
                    assert getattr(got, name) == getattr(expected, name), (site, step, name)


def plain(name: str) -> Recipe:
    recipe, _, density = name.partition("@")
    return resolve(recipe, density=float(density))


def everywhere(name: str) -> Mixed:
    """Return one recipe as the choice of a model in one piece."""
    options = (Option(name, plain(name), 0.3, 0.1),)
    group = Group((0.0, 1.0), 1.0, (Cell((0.0, 1.0), 1.0, options),))
    return Mixed((Course(group, options),))


def test_a_mixture_is_read_back_and_asked_for_by_density(tmp_path: Path) -> None:
    made = [as_recipe(everywhere("draft@0.2"), total, "mine", CHOICE) for total in (0.5, 0.2)]
    mixtures = Mixtures(name="mine", chosen=CHOICE, recipes=tuple(made))
    for name in ("mine.json", "mine.yaml"):
        write_file(mixtures, tmp_path / name)
        assert build(Mixtures, read_file(tmp_path / name), name) == mixtures
        assert resolve(tmp_path / name, density=0.5) == made[0]
        assert resolve(tmp_path / name) == made[1]  # the nearest to the usual density
        scaled = resolve(tmp_path / name, density=0.4, dense_steps=0)
        assert (scaled.total, scaled.dense_steps) == (0.4, 0)
        assert scaled.cases[0].select is not None
        assert scaled.cases[0].select.asked == pytest.approx(0.2 * 0.4 / 0.5)
        assert resolve({"base": str(tmp_path / name), "name": "other", "density": 0.2}).name == "other"
    assert files(tmp_path) == {"mine.json", "mine.yaml"}
    with pytest.raises(ConfigError, match="density: input should be less than or equal to 1, got 3"):
        resolve(tmp_path / "mine.json", density=3)
    with pytest.raises(ConfigError, match="needs a total, another one than the others'"):
        build(Mixtures, {**mixtures.model_dump(), "recipes": (made[0].model_dump(),) * 2}, "mine")


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_the_shipped_mixture_runs_and_says_what_it_is(family: str) -> None:
    pipe, call = tiny.FAMILIES[family]()
    with dit_accel.accelerate(pipe, "auto", density=0.5, dense_steps=0) as handle:
        tiny.generate(pipe, call)
    report = handle.report()
    assert report.sparse_calls > 0
    assert "auto mixes recipes: density 0.5 is asked of all calls after the dense steps together" in report.notes


@pytest.mark.parametrize(
    ("taken", "densities", "name", "said"),
    [
        (0.917, [], "mine", r"the cheapest choices measured take 0\.917, more than any recipe there was asked for"),
        (0.917, [0.5], "mine", r"density 0\.5: the cheapest choices measured take 0\.917"),
        (0.917, [0.95], "", "choose: name: string should have at least 1 character, got ''"),
        (0.5, [1.5], "mine", r"choose: density: input should be less than or equal to 1, got 1\.5"),
        (0.5, [-1], "mine", "choose: density: input should be greater than 0, got -1"),
    ],
)
def test_what_cannot_be_chosen_is_said(
    tmp_path: Path, taken: float, densities: list[float], name: str, said: str
) -> None:
    """A recipe that was asked for half of all pairs and took more, as rules with a least size do."""
    store = Store(tmp_path / "rows.jsonl", SETUP)
    (row,) = looked_into("draft", taken, lambda site, step: 0.1)
    store.add(row.model_copy(update={"asked": 0.5}))
    with pytest.raises(ConfigError, match=said):
        Chosen.of(store.path, densities, name, 2, 1)
    assert [one.recipe.total for one in Chosen.of(store.path, [0.95, 0.95], "mine", 2, 1).proposals] == [0.95]


# -- tried ---
@pytest.mark.parametrize(("psnr", "status"), [(22, "tried: +2.00 dB against draft@0.3"), (19, "so that is kept")])
def test_a_mixture_that_was_no_better_when_tried_is_given_up(tmp_path: Path, psnr: float, status: str) -> None:
    """Two recipes, each good in one half of the model: their mixture is proposed, and believed once it was seen."""
    store = Store(tmp_path / "rows.jsonl", SETUP)
    for name, better in (("draft", range(4)), ("svg2", range(4, 8))):
        (row,) = looked_into(name, 0.3, lambda site, step, better=better: 0.1 if site in better else 0.4)
        store.add(row)
    first = Chosen.of(store.path, [0.3], "auto", 2, 1)
    assert first.proposals[0].status == "not tried yet"
    assert [case.name for case in first.mixtures.recipes[0].cases] == ["draft@0.3", "svg2@0.3"]
    definition = first.mixtures.recipes[0].override(dense_steps=DENSE_STEPS).model_dump(mode="json")
    store.add(row.model_copy(update={
        "candidate": "auto@0.3", "definition": definition, "figures": Figures(psnr=psnr, ssim=0.9)
    }))  # fmt: skip
    again = Chosen.of(store.path, [0.3], "auto", 2, 1)
    assert status in again.proposals[0].status
    kept = [case.name for case in again.mixtures.recipes[0].cases]
    assert kept == (["draft@0.3", "svg2@0.3"] if psnr > 20 else ["draft@0.3"])
    assert again.mixtures.chosen.best == ("draft@0.3",)


# -- verdicts ---
def judged(name: str, psnr: list[float], prompts: str, recipe: Recipe, **more: Any) -> list[Row]:
    return [
        Row(candidate=name, family="recipe", definition=recipe.model_dump(mode="json"), prompt=prompt, seed=0,
            asked=0.3, figures=Figures(psnr=value, ssim=0.9), **more)
        for prompt, value in zip(prompts, psnr, strict=True)
    ]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Callable[[list[float]], tuple[Mixtures, Path]]:
    """Write rows of a mixture, of a good recipe and of the one that was best where the mixture was chosen."""
    recipe = as_recipe(everywhere("draft@0.3"), 0.3, "auto", CHOICE)
    mixtures = Mixtures(name="auto", chosen=CHOICE, recipes=(recipe,))

    def write(psnr: list[float], prompts: str = "abcdefg") -> tuple[Mixtures, Path]:
        store = Store(tmp_path / "rows.jsonl", SETUP)
        good, best = plain("svg2@0.3"), plain("draft@0.3")
        for row in [
            *judged("auto@0.3", psnr, prompts, recipe.override(dense_steps=DENSE_STEPS)),
            *judged("svg2@0.3", [40, 30, 32, 34, 30, 32, 34][: len(psnr)], prompts, good),
            *judged("draft@0.3", [50, 20, 22, 24, 20, 22, 24][: len(psnr)], prompts, best),
        ]:
            store.add(row)
        return mixtures, store.path

    return write


@pytest.mark.parametrize(
    ("psnr", "here", "there"),
    [
        ([0, 31, 34, 35, 31, 34, 35], "better: +1.33 dB (+1.00 to +1.67)", "better: +11.33 dB"),
        ([99, 29, 31, 33, 29, 31, 33], "worse: -1.00 dB (-1.00 to -1.00)", "better: +9.00 dB"),
        ([0, 31, 31, 34, 31, 31, 34], "not told apart: +0.00 dB (-0.67 to +0.67)", "better: +10.00 dB"),
    ],
)
def test_a_mixture_is_judged_by_prompts_it_has_not_seen(study: Any, psnr: list[float], here: str, there: str) -> None:
    found = judge(*study(psnr))
    assert (found.prompts, found.left_out) == (6, 1)
    (verdict,) = found.verdicts
    assert str(verdict.best_here).startswith(here)
    assert str(verdict.best_here).endswith("against svg2@0.3")
    assert str(verdict.best_there).startswith(there)
    assert "1 prompts left out because the choice had seen them" in found.markdown()


def test_what_cannot_be_judged_is_said(study: Any) -> None:
    mixtures, rows = study([30, 31], "ab")
    assert "one prompt, +1.00 dB against svg2@0.3: that decides nothing" in judge(mixtures, rows).markdown()
    seen = mixtures.model_copy(update={"chosen": CHOICE.model_copy(update={"prompts": ("a", "b")})})
    with pytest.raises(ConfigError, match="every prompt of it was used to choose auto"):
        judge(seen, rows)
    other = mixtures.model_copy(update={"recipes": (mixtures.recipes[0].override(cases=()),)})
    with pytest.raises(ConfigError, match="these rows are of another mixture of that name"):
        judge(other, rows)
    with pytest.raises(ConfigError, match="holds no row of mine"):
        judge(mixtures.model_copy(update={"name": "mine"}), rows)
    rows.unlink()
    few = judge(*study([0, 31, 33, 35, 31, 33], "abcdef"))
    assert "5 prompts, fewer than the 6 that can decide: +1.00 dB" in few.markdown()


# -- the commands ---
def test_from_a_study_to_a_verdict(evaluate: Callable[..., Result], cli: Callable[..., Result], tmp_path: Path) -> None:
    """Choose on one prompt, run the mixture beside its parts on another, and be told how it stands."""
    page, chosen = tmp_path / "out.html", tmp_path / "mine.json"
    few = ("--recipe", "draft", "--recipe", "svg1", "--density", 0.5, "--no-rivals", "--no-floors", "--steps", 2)
    rows = page.with_suffix(".jsonl")
    assert evaluate(page, *few).exit_code == 0
    result = cli("choose", rows, "-o", chosen, "--name", "mine", "--groups", 2, "--windows", 1, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [one["total"] for one in data["mixtures"]] == [0.5]
    assert data["chosen"]["prompts"] == ["a cat"]
    assert data["mixtures"][0]["expected"] <= 0.6
    result = evaluate(page, *few, "--recipe", chosen, "--prompt", "a dog", "--json")
    assert result.exit_code == 0, result.output
    (spent,) = (line["spent"] for line in json.loads(result.stdout)["candidates"] if line["candidate"] == "mine@0.5")
    assert spent == pytest.approx(data["mixtures"][0]["expected"], abs=0.02)
    table = tmp_path / "verdict.md"
    result = cli("judge", chosen, rows, "--markdown", table)
    assert result.exit_code == 0, result.output
    assert "mine, chosen on" in table.read_text()
    assert table.read_text().count("decides nothing") == 2
    assert "exists already; --force overwrites it" in error_of(cli("choose", rows, "-o", chosen))


@pytest.mark.parametrize(
    ("rows", "output", "said"),
    [("none.jsonl", "a.json", "none.jsonl: cannot be read"), ("none.jsonl", "a.txt", "mixtures are a .json or .yaml")],
)
def test_bad_input_is_one_line(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, output: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error_of(cli("choose", rows, "-o", output))
    assert not files(tmp_path)


def test_rows_that_nobody_looked_into_are_refused(study: Any) -> None:
    _, rows = study([30, 31], "ab")
    with pytest.raises(ConfigError, match="no recipe with a density was looked into"):
        Chosen.of(rows, [], "auto", 4, 2)
