"""A study from the command line: what it writes, that it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import ENVIRONMENT, error_of, files
from typer.testing import Result

from dit_accel import recipes
from dit_accel.eval import study
from dit_accel.eval.store import Figures, Row, load, open_media

Evaluate = Callable[..., Result]
SMALL = ("--steps", 4, "--height", 48, "--width", 40, "--text-length", 16, "--prompt", "a cat")  # as in conftest.py
FEW = ("--recipe", "draft", "--recipe", "oracle", "--density", 0.5, "--no-rivals", "--no-floors")


def rows_of(output: Path) -> list[Row]:
    return load(output.with_suffix(".jsonl"))[1]


def test_a_whole_study(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    table = tmp_path / "table.md"
    result = evaluate(
        output, "--recipe", "draft", "--recipe", "oracle", "--density", 0.5, "--markdown", table, "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    rows = {row.candidate: row for row in rows_of(output)}
    assert set(rows) == {
        "reference", "draft@0.5", "oracle@0.5", "steps-3", "steps-2", "first-block-0.05", "first-block-0.15",
        "taylorseer-2", "taylorseer-4", "magcache-0.06", "magcache-0.24", "floor-bf16", "floor-sdpa-math",
    }  # fmt: skip
    assert not [row.error for row in rows.values() if row.error]
    assert data["candidates"][0]["candidate"] == "reference"
    assert {line["candidate"] for line in data["candidates"]} == set(rows)
    assert data["setup"]["dense_steps"] == 0.2
    assert files(tmp_path) == {"out.html", "out.jsonl", "out-media", "table.md"}
    _check_sparse(rows["draft@0.5"])
    _check_sparse(rows["oracle@0.5"])
    assert rows["steps-3"].steps == 3
    assert rows["reference"].figures is None
    assert all(row.seconds and row.seconds > 0 for row in rows.values())
    for name in rows:
        assert name in output.read_text()
        assert f"| {name} |" in table.read_text()


def test_a_calibrated_recipe_takes_part_beside_itself(
    evaluate: Evaluate, cli: Evaluate, model: Path, tmp_path: Path
) -> None:
    output, profile = tmp_path / "out.html", tmp_path / "duo.json"
    few = ("--recipe", "duo", "--density", 0.6, "--no-rivals", "--no-floors")
    made = cli("calibrate", model, "--recipe", "duo", "--density", 0.6, "--set", "sinks=0", "-o", profile, *SMALL)
    assert made.exit_code == 0, made.output
    assert evaluate(output, *few, "--profile", profile).exit_code == 0
    rows = {row.candidate: row for row in rows_of(output)}
    assert set(rows) == {"reference", "duo@0.6", "duo@0.6+profile"}
    assert not [row.error for row in rows.values() if row.error]
    definition = rows["duo@0.6+profile"].definition
    assert definition["dense_steps"] == 0.2
    assert len(definition["profile"]) == 16
    assert "another one is called duo@0.6+profile" in error_of(
        evaluate(output, *few, "--profile", profile, "--profile", profile)
    )
    assert "none.json: cannot be read" in error_of(evaluate(output, *few, "--profile", tmp_path / "none.json"))


def _check_sparse(row: Row) -> None:
    assert row.density is not None
    assert row.overall_density is not None
    assert row.map is not None
    assert 0.3 < row.density < 0.8
    dense = [all(d == 1 for d in step) for step in row.map.density]
    assert dense == [True, False, False, False]  # a fifth of four steps, rounded
    mean = sum(map(sum, row.map.density)) / (len(row.map.density) * len(row.map.sites))
    assert row.overall_density == pytest.approx(mean, abs=1e-3)
    assert {sample.site for sample in row.samples} == set(row.map.sites)
    assert {sample.step for sample in row.samples} == {1, 2, 3}
    for sample in row.samples:
        assert 0 < sample.recall <= sample.best_recall + 1e-5
        assert sample.error > 0


def test_every_recipe_starts_from_the_same_warm_up(evaluate: Evaluate, tmp_path: Path) -> None:
    """Recipes with other defaults of their own are evened out, or the comparison would be one of warm-ups."""
    assert len({recipe.dense_steps for recipe in recipes().values()}) > 1
    output = tmp_path / "out.html"
    names = [part for name in ("quality", "fast", "grat-x") for part in ("--recipe", name)]
    result = evaluate(
        output, *names, "--density", 0.5, "--no-rivals", "--no-floors", "--dense-steps", 0.5, "--dense-layers", 1
    )
    assert result.exit_code == 0, result.output
    sparse = [row for row in rows_of(output) if row.family == "recipe"]
    assert len(sparse) == 3
    for row in sparse:
        assert row.map is not None
        assert [[d == 1 for d in step] for step in row.map.density] == [[True, True]] * 2 + [[True, False]] * 2


def test_a_density_of_one_is_the_reference(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, "--recipe", "draft", "--density", 1, "--no-rivals", "--no-floors").exit_code == 0
    (row,) = [row for row in rows_of(output) if row.candidate == "draft@1"]
    assert row.figures is not None
    assert (row.figures.psnr, row.overall_density) == (None, 1)


def test_a_clip_is_measured_frame_by_frame(cli: Callable[..., Result], clip_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    small = ("--steps", 2, "--height", 80, "--width", 48, "--frames", 9, "--text-length", 16, "--prompt", "a cat")
    result = cli(
        "eval", "-o", output, "--model", clip_model, *small, "--recipe", "draft", "--density", 0.4, "--no-floors",
        "--dense-steps", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row.candidate: row for row in rows_of(output)}
    row = rows["draft@0.4"]
    assert row.figures is not None
    assert row.map is not None
    assert row.frames == len(row.figures.frame_psnr) == 9
    assert row.figures.temporal_error is not None
    media = open_media(output.with_suffix(".jsonl"), row)
    assert media is not None
    assert (len(media.frames), media.image.size) == (9, (48, 80))
    assert "data:image/webp;base64," in output.read_text()
    assert all(r.error or r.figures or r.family == "reference" for r in rows.values())


# -- several at once ---
TINY_CLIP = ("--steps", 2, "--height", 80, "--width", 48, "--frames", 9, "--text-length", 16, "--prompt", "a cat")


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_the_first_of_a_batch_is_measured_as_it_is_alone(
    cli: Evaluate, model: Path, clip_model: Path, tmp_path: Path, kind: str
) -> None:
    """In fp32 a batch adds up in another order, so that a few 8-bit values may come out one level apart.

    Seen: up to 3 of 100,000, which is 7e-5 in the mean square and 0.01 dB where pictures are as near as 66 dB.
    """
    calls = {"picture": (model, SMALL), "clip": (clip_model, TINY_CLIP)}
    path, small = calls[kind]
    few = (
        "--recipe",
        "draft",
        "--recipe",
        "oracle",
        "--recipe",
        "svg-ear",
        "--density",
        0.4,
        "--no-floors",
        "--no-rivals",
    )
    for batch in (1, 2):
        output = tmp_path / f"{batch}.jsonl"
        result = cli("eval", "-o", output, "--model", path, *small, *few, "--dense-steps", 0, "--batch", batch)
        assert result.exit_code == 0, result.output
    (one, alone), (two, both) = (load(tmp_path / f"{batch}.jsonl") for batch in (1, 2))
    assert (one.batch, two.batch) == (1, 2)
    assert two.timed_on == f"{one.timed_on}, 2 at once"
    assert [row.key for row in alone] == [row.key for row in both]
    for a, b in zip(alone[1:], both[1:], strict=True):
        assert a.figures is not None
        assert b.figures is not None
        assert 0 < squares(a.figures) == pytest.approx(squares(b.figures), abs=1e-3)
        assert b.figures.ssim == pytest.approx(a.figures.ssim, abs=1e-4)


def squares(figures: Figures) -> float:
    """Return the mean squared difference of 8-bit values."""
    return 0.0 if figures.psnr is None else 255**2 / 10 ** (figures.psnr / 10)


def test_rows_of_another_batch_are_refused_and_old_ones_are_of_one(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert evaluate(output, *FEW).exit_code == 0
    old = [json.loads(line) for line in output.read_text().splitlines()]
    assert old[0].pop("batch") == 1
    output.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert load(output)[0].batch == 1
    assert evaluate(output, *FEW, "--batch", 1).exit_code == 0
    assert "batch: 1 there, 2 here" in error_of_run(evaluate(output, *FEW, "--batch", 2))


def test_a_pipeline_that_makes_one_at_a_time_is_refused(cli: Evaluate, evaluate: Evaluate, tmp_path: Path) -> None:
    """CogVideoX takes a number of clips, and then makes one."""
    tiny.cogvideox()[0].save_pretrained(tmp_path / "cog")
    few = ("--recipe", "draft", "--density", 0.5, "--no-rivals", "--no-floors", "--batch", 2)
    result = cli("eval", "-o", tmp_path / "out.jsonl", "--model", tmp_path / "cog", *TINY_CLIP, *few)
    assert "CogVideoXPipeline makes no 2 of a prompt at once" in error_of_run(result)
    assert evaluate(tmp_path / "out.jsonl", *FEW, "--batch", 0).exit_code == 2
    assert files(tmp_path) == {"cog"}


# -- going on ---
def test_a_finished_study_runs_nothing_again(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    before = output.with_suffix(".jsonl").read_bytes()
    monkeypatch.setattr(study, "generate_stock", lambda *_, **__: pytest.fail("it ran again"))
    assert evaluate(output, *FEW).exit_code == 0
    assert output.with_suffix(".jsonl").read_bytes() == before


def test_more_candidates_and_prompts_are_added(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    before = output.with_suffix(".jsonl").read_bytes()
    assert evaluate(output, *FEW, "--recipe", "grat-b", "--prompt", "a dog", "--seed", 0, "--seed", 4).exit_code == 0
    rows = rows_of(output)
    assert output.with_suffix(".jsonl").read_bytes().startswith(before)
    assert len(rows) == 4 * 2 * 2  # reference, three candidates; two prompts; two seeds
    assert len({row.key for row in rows}) == len(rows)


def test_a_study_cut_within_a_row_goes_on_with_that_row(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    file = output.with_suffix(".jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert evaluate(output, "--report", file).exit_code == 0  # reading passes over what is cut
    assert evaluate(output, *FEW).exit_code == 0
    again = rows_of(output)
    assert [row.candidate for row in again] == ["reference", "draft@0.5", "oracle@0.5"]
    assert file.read_bytes().startswith(whole[: whole[:-1].rfind(b"\n") + 1])


@pytest.mark.parametrize(("error", "again"), [("CUDA out of memory. Tried to allocate 1.86 GiB", True), ("no", False)])
def test_only_what_lacked_memory_is_tried_again(evaluate: Evaluate, tmp_path: Path, error: str, again: bool) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    file = output.with_suffix(".jsonl")
    *lines, last = file.read_text().splitlines()
    failed = {**json.loads(last), "error": error, "figures": None, "media": None, "seconds": None}
    file.write_text("\n".join([*lines, json.dumps(failed)]) + "\n")
    assert evaluate(output, *FEW).exit_code == 0
    rows = rows_of(output)
    assert len(rows) == len(lines)  # the first line is the setup
    assert (rows[-1].error is None) == again
    assert (rows[-1].figures is not None) == again
    assert file.read_text().count("\n") == len(lines) + 1 + again


def test_a_killed_study_goes_on(model: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """Kill a real process once it has written something; the rest comes from another, and equals an unbroken run."""
    output, unbroken = tmp_path / "out.html", tmp_path / "unbroken.html"
    file = output.with_suffix(".jsonl")
    arguments = ["eval", "-o", output, "--model", model, *SMALL, *FEW, "--recipe", "grat-x", "--seed", 0, "--seed", 1]
    command = [sys.executable, "-m", "dit_accel.eval.cli", *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while (not file.exists() or file.read_bytes().count(b"\n") < 3) and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = file.read_bytes()
    left = written[: written.rfind(b"\n") + 1]
    assert 3 <= left.count(b"\n") < 9
    assert evaluate(output, *FEW, "--recipe", "grat-x", "--seed", 0, "--seed", 1).exit_code == 0
    assert file.read_bytes().startswith(left)
    assert evaluate(unbroken, *FEW, "--recipe", "grat-x", "--seed", 0, "--seed", 1).exit_code == 0
    figures, expected = ({row.key: row.figures for row in rows_of(path)} for path in (output, unbroken))
    assert figures == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--steps", 3), "settings.steps: 4 there, 3 here"),
        (("--dense-steps", 0.5), "dense_steps: 0.2 there, 0.5 here"),
        (("--dtype", "bf16"), "dtype: float32 there, bfloat16 here"),
    ],
)
def test_a_changed_setting_is_refused(evaluate: Evaluate, tmp_path: Path, change: tuple[Any, ...], said: str) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    before = output.with_suffix(".jsonl").read_bytes()
    line = error_of_run(evaluate(output, *FEW, *change))
    assert said in line
    assert "name another output" in line
    assert output.with_suffix(".jsonl").read_bytes() == before


def test_a_changed_recipe_of_the_same_name_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    output, recipe = tmp_path / "out.html", tmp_path / "mine.yaml"
    few = ("--recipe", recipe, "--density", 0.5, "--no-rivals", "--no-floors")
    recipe.write_text("base: draft\nname: mine\n")
    assert evaluate(output, *few).exit_code == 0
    recipe.write_text("base: draft\nname: mine\nevery: 2\n")
    assert "mine@0.5 was measured with other settings (every: 1 there, 2 here)" in error_of_run(evaluate(output, *few))


# -- bad input ---
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "drft"), "Did you mean 'draft'?"),
        (("--density", 0), "density: must lie above 0 and up to 1, got 0"),
        (("--density", "nan"), "density: must lie above 0"),
        (("--seed", -1), "seed"),
        (("--dense-steps", 2), "dense_steps"),
        (("--height", 47, "--frames", 3), "frames: FluxPipeline takes no such setting"),
        (("--prompts", "nowhere.txt"), "prompts nowhere.txt: cannot be read"),
        (("--report", "nowhere.jsonl"), "nowhere.jsonl: cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error_of_run(evaluate(tmp_path / "out.html", *arguments))
    assert not files(tmp_path)


def error_of_run(result: Result) -> str:
    """Return the one error line; the progress of loading, which is on stderr too, is let pass."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stdout == ""
    return lines[0]


def test_an_output_that_is_no_page_is_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    assert "the report is an .html file" in error_of(evaluate(tmp_path / "out.png"))
    assert "the report is an .html file." in error_of(evaluate(tmp_path / "a.jsonl", "--report", tmp_path / "b.jsonl"))


def test_rows_alone_need_no_package_of_the_report(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert evaluate(tmp_path / "out.jsonl", *FEW).exit_code == 0
    assert files(tmp_path) == {"out.jsonl", "out-media"}
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) > 1


@pytest.mark.parametrize("text", ["", "no json\n", '{"format": 1}\n'])
def test_a_file_that_holds_no_study_is_refused(evaluate: Evaluate, tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    line = error_of(evaluate(tmp_path / "out.html", "--report", file))
    assert str(file) in line
    assert files(tmp_path) == {"rows.jsonl"}


def test_a_lost_reference_is_said(evaluate: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "out.html"
    assert evaluate(output, *FEW).exit_code == 0
    for file in (tmp_path / "out-media").iterdir():
        file.unlink()
    assert "the reference of a started study is gone" in error_of_run(evaluate(output, *FEW))


def test_a_candidate_that_fails_stops_no_other(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_accel.eval.oracle import OraclePlanner

    def fails(*_: Any) -> Any:
        raise RuntimeError("no oracle\ntoday")

    monkeypatch.setattr(OraclePlanner, "plan", fails)
    output = tmp_path / "out.html"
    assert evaluate(output, "--recipe", "oracle", *FEW[:2], *FEW[4:]).exit_code == 0
    rows = {row.candidate: row for row in rows_of(output)}
    assert rows["oracle@0.5"].error == "no oracle today"
    assert rows["draft@0.5"].error is None
    assert "gave nothing: oracle@0.5: no oracle today" in output.read_text()


def test_the_pipeline_is_stock_again_after_every_candidate(tmp_path: Path) -> None:
    """Caches and recipes leave no attribute behind, and the stock pipeline's picture is what it was."""
    from dit_accel.eval.candidates import Cached, sparse_candidates
    from dit_accel.eval.rivals import caches
    from dit_accel.pipelines.settings import Settings

    pipe, call = tiny.flux()
    before = tiny.generate(pipe, call, steps=4)
    attributes = {id(m): set(vars(m)) for m in pipe.transformer.modules()}
    others = caches(4, 0.2, lambda: [1.0, 1.0, 0.9, 0.9])
    candidates = [
        *sparse_candidates(["draft", "oracle"], [0.5], 0.2, 0),
        *(Cached(c.name, "cache", c.settings, None, c) for c in others),
    ]
    changed = 0
    for candidate in candidates:
        with candidate.applied(pipe, Settings()) as course:
            changed += not torch.equal(tiny.generate(course.pipe, call, steps=4), before)
        assert {id(m): set(vars(m)) for m in pipe.transformer.modules()} == attributes, candidate.name
        assert torch.equal(tiny.generate(pipe, call, steps=4), before), candidate.name
    assert changed >= 4  # recipes, and most caches, did something
