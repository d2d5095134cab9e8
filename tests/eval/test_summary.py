"""Means, intervals, the Pareto front and modelled times against numbers worked out by hand, and what the page holds."""

from __future__ import annotations

import io
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_accel.errors import ConfigError
from dit_accel.eval import plots
from dit_accel.eval.modelled import models
from dit_accel.eval.report import Summary, html
from dit_accel.eval.store import DensityMap, Figures, Row, Setup, Store, load
from dit_accel.eval.summary import bootstrap, paired, pareto, spent, standings
from dit_accel.eval.tables import Cell, tables, winners


def row(candidate: str, family: Any, psnr: float | None, prompt: str = "a", seed: int = 0, **more: Any) -> Row:
    figures = None if family == "reference" else Figures(psnr=psnr, ssim=0.9)
    given = {"definition": {}, "steps": 2, "seconds": 1.0, "figures": figures, **more}
    return Row(candidate=candidate, family=family, prompt=prompt, seed=seed, **given)


def step_file(folder: Path) -> Path:
    """Write a step benchmark's result: stock 1000 ms; 700, 500 and 400 ms at densities 0.5, 0.3, 0.2."""
    points = ((0.5, 700.0), (0.3, 500.0), (0.2, 400.0))
    rows = [{"case": "big", "density": d, "step_ms": ms, "stock_step_ms": 1000.0} for d, ms in points]
    file = folder / "step_gpu.json"
    file.write_text(json.dumps({"gpu": "GPU", "rows": rows}))
    return file


def test_intervals_are_over_prompts_with_seeds_averaged_first() -> None:
    rows = [row("x", "recipe", p, prompt, seed) for prompt, seed, p in (("a", 0, 10), ("a", 1, 30), ("b", 0, 40))]
    (line,) = standings(rows)
    assert line.figures["psnr"].mean == pytest.approx(30)  # of 20 and 40
    assert (line.figures["psnr"].low, line.figures["psnr"].high) == (20, 40)
    assert line.prompts == 2
    (alone,) = standings(rows[:2])
    assert alone.figures["psnr"].low is None


def test_the_bootstrap_narrows_with_more_prompts_and_holds_the_mean() -> None:
    make = random.Random(0)
    few, many = (bootstrap([make.gauss(30, 2) for _ in range(n)]) for n in (5, 500))
    for interval in (few, many):
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.mean < interval.high
    assert many.low is not None
    assert many.high is not None
    assert many.high - many.low == pytest.approx(2 * 1.96 * 2 / 500**0.5, rel=0.15)


def test_pareto_keeps_what_nothing_beats() -> None:
    points = [(1.0, 10.0), (2.0, 9.0), (2.0, 12.0), (3.0, 12.0), (4.0, 15.0)]
    assert pareto(points) == [0, 2, 4]


def test_equal_pictures_have_no_mean_and_stand_first() -> None:
    lines = standings([row("low", "recipe", 20), row("same", "recipe", None)])
    assert [line.candidate for line in lines] == ["same", "low"]
    assert lines[0].equal
    assert "psnr" not in lines[0].figures


def test_modelled_times_follow_the_steps_and_densities_run(tmp_path: Path) -> None:
    step_file(tmp_path)
    (tmp_path / "step_tiny_cpu.json").write_text("{}")  # a trial of the benchmark, no measurement
    (model,) = models(tmp_path)
    seen = DensityMap(sites=("p", "q"), density=((1, 1), (0.5, 0.4), (0.1, 0.6)))
    # dense 1000; (700 + 600) / 2; the least measured 400, and 800 on the line of the last two
    assert model.seconds(row("x", "recipe", 20, map=seen)) == pytest.approx((1000 + 650 + 600) / 1e3)
    assert model.seconds(row("steps-9", "steps", 20, steps=9)) == pytest.approx(9)
    assert model.seconds(row("cache", "cache", 20)) is None
    assert model.seconds(row("oracle@0.3", "oracle", 20, map=seen)) is None


def test_a_step_is_the_mean_over_those_that_keep_its_decision(tmp_path: Path) -> None:
    step = json.loads(step_file(tmp_path).read_text())
    for line in step["rows"]:
        line |= {"every": 4, "kept_step_ms": line["step_ms"] - 100}
    step_file(tmp_path).write_text(json.dumps(step))
    (model,) = models(tmp_path)
    seen = DensityMap(sites=("p",), density=((1,), (0.5,)))
    assert model.seconds(row("x", "recipe", 20, map=seen)) == pytest.approx((1000 + (700 + 3 * 600) / 4) / 1e3)
    del step["rows"][0]["kept_step_ms"]
    step_file(tmp_path).write_text(json.dumps(step))
    assert models(tmp_path) == []
    for line in step["rows"]:  # older results do not say how long one is kept; the recipe does
        line.pop("kept_step_ms", None), line.pop("every")
    step_file(tmp_path).write_text(json.dumps({**step, "recipe": "balanced"}))
    assert models(tmp_path) == []
    step_file(tmp_path).write_text(json.dumps({**step, "recipe": "balanced", "settings": {"every": 1}}))
    assert len(models(tmp_path)) == 1


def test_a_recipe_that_was_timed_at_the_shape_costs_its_own_calls(tmp_path: Path) -> None:
    step = json.loads(step_file(tmp_path).read_text())
    for line in step["rows"]:
        line["depth"] = 10
    step_file(tmp_path).write_text(json.dumps({**step, "recipe": "draft"}))

    def timed(name: str, decision: float, *kernels: float) -> dict[str, Any]:
        kinds = {str(ms): {"calls": 5, "device": {"kernel": ms, "merge": 1.0}} for ms in kernels}
        return {"recipe": name, "density": 0.5, "decision_ms": decision, "hopper": True, "kinds": kinds}

    file = tmp_path / "decide_big_gpu.json"
    older = {**timed("old", 4.0, 999.0), "hopper": False}  # of its kernels nothing can be said
    file.write_text(json.dumps({"rows": [timed("draft", 1.0, 19.0), timed("slow", 3.0, 29.0, 49.0), older]}))
    (model,) = models(tmp_path)
    seen = DensityMap(sites=("p",), density=((1,), (0.5,)))
    given = {"map": seen, "definition": {"name": "slow"}}
    # dense 1000, and 700 for a step of the benchmark's; of slow 3 + 40 ms a call, not 1 + 20
    assert model.seconds(row("x", "recipe", 20, **given)) == pytest.approx((1000 + 700 + 10 * 22) / 1e3)
    assert model.seconds(row("y", "recipe", 20, map=seen)) == pytest.approx(1.7)
    given["definition"] = {"name": "old"}
    assert model.seconds(row("z", "recipe", 20, **given)) == pytest.approx((1000 + 700 + 10 * 3) / 1e3)
    thin = {**timed("thin", 2.0, 99.0), "density": 0.2}  # too few pairs to tell of half of all
    file.write_text(json.dumps({"rows": [timed("draft", 1.0, 19.0), timed("slow", 3.0, 29.0, 49.0), thin]}))
    (model,) = models(tmp_path)
    given["definition"] = {"name": "thin"}
    assert model.seconds(row("t", "recipe", 20, **given)) == pytest.approx((1000 + 700 + 10 * 1) / 1e3)
    given["definition"] = {"name": "slow", "correct": {"kind": "centroids"}}
    assert model.seconds(row("x", "recipe", 20, **given)) == pytest.approx((1000 + 700 + 10 * 22) / 1e3)
    assert model.caveat is None
    given["definition"] = {"name": "new", "correct": {"kind": "centroids"}}
    assert model.seconds(row("w", "recipe", 20, **given)) is None  # what its correction takes was not measured
    other = tmp_path / "step_other.json"  # the same shape on a device whose decisions were not timed, and another shape
    other.write_text(json.dumps({**step, "recipe": "draft", "gpu": "Other"}))
    assert [(one.name, one.device) for one in models(tmp_path)] == [(model.name, model.device)]
    small = [{**line, "case": "small"} for line in step["rows"]]
    other.write_text(json.dumps({**step, "recipe": "draft", "gpu": "Other", "rows": small}))
    assert {one.name for one in models(tmp_path)} == {model.name, "small"}
    other.unlink()
    file.rename(tmp_path / "elsewhere.json")
    (model,) = models(tmp_path)
    assert model.caveat is not None
    assert model.seconds(row("w", "recipe", 20, **given)) is None
    given["definition"] = {"name": "draft", "correct": {"kind": "centroids"}}
    assert model.seconds(row("v", "recipe", 20, **given)) == pytest.approx(1.7)  # the step benchmark's own recipe
    file.write_text('{"rows": [{}]}')
    with pytest.raises(ConfigError, match="is no result of bench_decide"):
        models(tmp_path)


def test_compressed_rows_are_read_as_they_were(tmp_path: Path) -> None:
    setup = Setup(
        model="m", settings={}, dtype="float32", device="cpu", dense_steps=0.2, dense_layers=0, versions={"torch": "2"}
    )
    store = Store(tmp_path / "rows.jsonl", setup)
    store.add(row("draft@0.3", "recipe", 20))
    packed = tmp_path / "rows.jsonl.xz"
    packed.write_bytes(lzma.compress(store.path.read_bytes()))
    assert load(packed) == load(store.path)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"rows\.jsonl\.xz: cannot be read"):
        load(packed)


def test_a_broken_benchmark_file_is_one_line(tmp_path: Path) -> None:
    step_file(tmp_path).write_text('{"rows": [{}]}')
    with pytest.raises(ConfigError, match="is no result of the step benchmark"):
        models(tmp_path)


def test_a_map_has_a_pixel_for_each_step_and_site() -> None:
    drawn = Image.open(io.BytesIO(plots.map_plot(DensityMap(sites=("p", "q"), density=((1, 1), (1, 0), (1, 0.5))))))
    assert drawn.size == (3, 2)
    dense, half, none = (drawn.convert("L").getpixel(at) for at in ((0, 0), (2, 1), (1, 1)))
    assert dense < half < none
    assert none > 240


def test_the_page_shows_each_time_axis_alone_and_escapes(tmp_path: Path) -> None:
    setup = Setup(
        model="<b>m</b>", settings={"steps": 2}, dtype="float32", device="cpu, 1 threads", dense_steps=0.2,
        dense_layers=0, versions={"torch": "2"},
    )  # fmt: skip
    store = Store(tmp_path / "rows.jsonl", setup)
    seen = DensityMap(sites=("p",), density=((1,), (0.3,)))
    store.add(row("reference", "reference", None, "<script>"))
    for name, psnr in (("draft@0.3", 20), ("draft@0.5", 25)):
        store.add(row(name, "recipe", psnr, "<script>", density=0.3, overall_density=0.65, map=seen))
    empty = tmp_path / "none"
    empty.mkdir()
    page = html(Summary.of(store.path, empty))
    assert "Quality over wall time on cpu, 1 threads" in page
    assert "seconds (cpu, 1 threads)" in page
    assert "<th>modelled s" not in page
    assert "no modelled times" in page
    assert "density of draft@0.3" in page
    assert "<b>m</b>" not in page
    step_file(tmp_path)
    page = html(Summary.of(store.path, tmp_path))
    assert "Quality over modelled time: big on GPU" in page
    assert "<th>modelled s (big, GPU)</th>" in page
    assert "no modelled times" not in page
    assert "modelled s (big, GPU) charges every recipe" in page


SETUP = Setup(
    model="m", settings={"steps": 4}, dtype="float32", device="cpu, 1 threads", dense_steps=0.25, dense_layers=1,
    versions={},
)  # fmt: skip
PROMPTS = ("a", "b", "c", "d")


def candidate(name: str, psnr: list[float | None], asked: float | None = 0.3, **more: Any) -> list[Row]:
    family = more.pop("family", "recipe")
    return [row(name, family, p, prompt, asked=asked, **more) for p, prompt in zip(psnr, PROMPTS, strict=False)]


def dense_at(*shares: float) -> DensityMap:
    """Return the map of four steps and two sites: all dense, but the second site from the second step on."""
    return DensityMap(sites=("p", "q"), density=((1, 1), *((1.0, share) for share in shares)))


def ranked(rows: list[Row]) -> list[Any]:
    return tables(standings(rows, (), SETUP), rows, SETUP, ())


def test_spent_counts_the_calls_that_may_run_sparse() -> None:
    assert spent(row("x", "recipe", 20, map=dense_at(0.2, 1.0, 0.3)), SETUP) == pytest.approx(0.5)
    assert spent(row("x", "recipe", 20), SETUP) is None


def test_the_paired_difference_is_over_prompts_that_both_have() -> None:
    ours, theirs = candidate("x", [20, 31, None, 40]), candidate("y", [19, 29, 10])
    apart = paired(ours, theirs)
    assert apart is not None
    assert (apart.mean, apart.low, apart.high) == (pytest.approx(1.5), 1, 2)
    assert paired(ours[:1], theirs[1:]) is None


def test_a_table_for_each_density_best_first_and_the_others_apart() -> None:
    rows = [
        row("reference", "reference", None),
        *candidate("low@0.3", [20, 20]),
        *candidate("high@0.3", [30, 31]),
        *candidate("high@0.5", [40], asked=0.5),
        *candidate("fixed", [25], asked=None),
        *candidate("oracle@0.3", [28], family="oracle"),
        *candidate("steps-3", [45], asked=None, family="steps"),
        *candidate("floor", [None], asked=None, family="floor"),
    ]
    found = {table.title: [line[0].text for line in table.rows] for table in ranked(rows)}
    assert found == {
        "Reference": ["reference"],
        "Density 0.5": ["high@0.5"],
        "Density 0.3": ["high@0.3", "low@0.3"],
        "Rules that take no density": ["fixed"],
        "Oracle": ["oracle@0.3"],
        "Fewer steps": ["steps-3"],
        "Noise floors": ["floor"],
    }
    best = winners(standings(rows, (), SETUP))
    assert [[cell.text for cell in line] for line in best.rows] == [
        ["Density 0.5", "high@0.5", "40.00", "", ""],
        ["Density 0.3", "high@0.3", "30.50 (30.00 to 31.00)", "", "28.00"],
    ]


def test_what_computes_more_than_asked_is_not_the_best_and_what_is_alike_is_marked() -> None:
    rows = [
        *candidate("greedy@0.3", [40, 40, 40, 40], map=dense_at(0.4, 0.4, 0.4)),
        *candidate("best@0.3", [30, 34, 32, 36], map=dense_at(0.3, 0.36, 0.4)),
        *candidate("close@0.3", [31, 33, 32, 35], map=dense_at(0.3, 0.3, 0.3)),
        *candidate("far@0.3", [20, 24, 22], map=dense_at(0.3, 0.3, 0.3)),
    ]
    (table,) = ranked(rows)
    psnr, spent_at = table.columns.index("PSNR dB"), table.columns.index("spent")
    assert [line[spent_at].text for line in table.rows] == ["0.400 †", "0.353", "0.300", "0.300"]
    assert [line[psnr].best for line in table.rows] == [False, True, False, False]
    assert [line[psnr].text.endswith("≈") for line in table.rows] == [False, False, True, False]
    assert [line[0].text.endswith("‡") for line in table.rows] == [False, False, False, True]  # one prompt is missing
    assert [note[0] for note in table.notes] == ["†", "≈", "‡"]
    text = table.trimmed.markdown()
    assert "| greedy@0.3 | 0.400 † |" in text
    assert "| **33.00 (31.00 to 35.00)** |" in text
    assert "MS-SSIM" not in text  # nothing stands there
    assert winners(standings(rows, (), SETUP)).rows[0][1] == Cell("best@0.3")


def test_of_figures_where_less_is_better_the_least_is_marked() -> None:
    flips = {"a@0.3": 0.2, "b@0.3": 0.1}
    rows = [
        Row(candidate=name, family="recipe", definition={}, prompt="a", seed=0, asked=0.3, seconds=flip * 10,
            figures=Figures(psnr=20, ssim=0.9, flip=flip))
        for name, flip in flips.items()
    ]  # fmt: skip
    (table,) = ranked(rows)
    for title in ("FLIP", f"seconds ({SETUP.device})"):
        at = table.columns.index(title)
        assert [line[at].best for line in table.rows if line[0].text == "b@0.3"] == [True]
        assert [line[at].best for line in table.rows if line[0].text == "a@0.3"] == [False]
