"""A study in shares: together they run everything once, and their joined rows are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import error_of
from typer.testing import Result

from dit_accel.errors import ConfigError
from dit_accel.eval.shares import Share, join
from dit_accel.eval.store import Row, Setup, Store, load, open_media

Evaluate = Callable[..., Result]
FEW = ("--recipe", "draft", "--recipe", "oracle", "--recipe", "grat-b", "--density", 0.5, "--no-rivals", "--no-floors")
MORE = (*FEW, "--prompt", "a dog")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_every_candidate_is_in_one_share(count: int) -> None:
    names = list("abcdefg")
    shares = [Share.parse(f"{i}/{count}").of(names) for i in range(1, count + 1)]
    assert sorted(name for share in shares for name in share) == names
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "one/two", " 1/2"])
def test_what_is_no_share_is_refused(evaluate: Evaluate, tmp_path: Path, text: str) -> None:
    assert "share: is" in error_of(evaluate(tmp_path / "out.jsonl", *FEW, f"--share={text}"))
    assert not list(tmp_path.iterdir())


def shares(evaluate: Evaluate, folder: Path, *arguments: Any) -> list[Path]:
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for number, file in enumerate(files, 1):
        result = evaluate(file, *MORE, *arguments, "--share", f"{number}/2")
        assert result.exit_code == 0, result.output
    return files


def told(row: Row) -> dict[str, Any]:
    """What of a row does not depend on when and where it was made."""
    return row.model_dump(mode="json", exclude={"seconds", "peak_bytes"})


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.xz"])
def test_joined_shares_are_the_whole_study(evaluate: Evaluate, cli: Evaluate, tmp_path: Path, name: str) -> None:
    one, output = tmp_path / "one.jsonl", tmp_path / name
    assert evaluate(one, *MORE).exit_code == 0
    files = shares(evaluate, tmp_path)
    assert [sorted({row.candidate for row in load(file)[1]}) for file in files] == [
        ["draft@0.5", "grat-b@0.5", "reference"],
        ["oracle@0.5", "reference"],
    ]
    result = cli("join", *files, "-o", output, "--json")
    assert json.loads(result.stdout) == {"output": str(output), "rows": 8, "failed": 0, "cut": 0}
    setup, rows = load(output)
    assert setup == load(one)[0]
    assert {row.key: told(row) for row in rows} == {row.key: told(row) for row in load(one)[1]}
    assert [row.prompt for row in rows] == ["a cat"] * 4 + ["a dog"] * 4
    assert [row.candidate for row in rows][::4] == ["reference"] * 2
    for row in rows:
        mine, other = open_media(output, row), open_media(one, row)
        assert mine is not None
        assert other is not None
        assert mine.image.tobytes() == other.image.tobytes()


def test_a_joined_study_goes_on(evaluate: Evaluate, cli: Evaluate, tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    assert cli("join", *shares(evaluate, tmp_path), "-o", output).exit_code == 0
    assert evaluate(output, *MORE, "--recipe", "grat-x").exit_code == 0
    assert len(load(output)[1]) == 10


def test_a_row_that_failed_gives_way(evaluate: Evaluate, cli: Evaluate, tmp_path: Path) -> None:
    first, second = shares(evaluate, tmp_path)
    *lines, last = first.read_text().splitlines()
    failed = {**json.loads(last), "error": "no", "figures": None, "media": None}
    again = tmp_path / "again.jsonl"
    again.write_text(f"{lines[0]}\n{last}\n{last[:40]}")  # and a line cut in the writing
    first.write_text("\n".join([*lines, json.dumps(failed)]) + "\n")
    assert cli("join", first, second, "-o", tmp_path / "with.jsonl").exit_code == 0
    assert sum(row.error == "no" for row in load(tmp_path / "with.jsonl")[1]) == 1
    for n, files in enumerate([(first, second, again), (again, second, first)]):
        output = tmp_path / f"without-{n}.jsonl"
        assert cli("join", *files, "-o", output).exit_code == 0
        assert not [row for row in load(output)[1] if row.error]
        assert len(load(output)[1]) == 8


def test_rows_that_were_cut_are_counted(cli: Evaluate, tmp_path: Path) -> None:
    setup = Setup(model="m", settings={}, dtype="float32", device="cpu", dense_steps=0, dense_layers=0, versions={})
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        for prompt in ("a cat", "a dog"):
            Store(file, setup).add(Row(candidate=file.stem, family="recipe", definition={}, prompt=prompt, seed=0))
    whole = cli("join", *files, "-o", tmp_path / "whole.jsonl")
    assert whole.stdout.rstrip().endswith("whole.jsonl: 4 rows, 0 of them failures")
    files[1].write_text(files[1].read_text()[:-9])
    cut = cli("join", *files, "-o", tmp_path / "cut.jsonl", "--json")
    assert cut.stderr.rstrip().endswith("cut.jsonl: 3 rows, 0 of them failures, 1 cut short and left out")
    assert json.loads(cut.stdout)["cut"] == 1
    assert [row.key for row in load(tmp_path / "cut.jsonl")[1]] == [
        ("a", "a cat", 0), ("b", "a cat", 0), ("a", "a dog", 0)
    ]  # fmt: skip


def test_attention_is_looked_into_for_as_many_prompts_as_asked(evaluate: Evaluate, tmp_path: Path) -> None:
    for looked in (0, 1, 2):
        output = tmp_path / f"{looked}.jsonl"
        assert evaluate(output, *MORE, "--recipe", "draft", "--looked", looked).exit_code == 0
        rows = [row for row in load(output)[1] if row.candidate == "draft@0.5"]
        assert [bool(row.samples) for row in rows] == [looked > 0, looked > 1]


def test_what_does_not_belong_together_is_refused(evaluate: Evaluate, cli: Evaluate, tmp_path: Path) -> None:
    first, second = shares(evaluate, tmp_path)
    output = tmp_path / "all.jsonl"
    other, changed = tmp_path / "other.jsonl", tmp_path / "changed.jsonl"
    assert evaluate(other, *MORE, "--steps", 3).exit_code == 0
    assert "settings.steps: 3 there, 4 here" in error_of(cli("join", first, other, "-o", output))
    lines = first.read_text().splitlines()
    row = json.loads(lines[-1])
    row["definition"]["dense_layers"] = 1
    changed.write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    assert "was measured with other settings (dense_layers: 1 there, 0 here)" in error_of(
        cli("join", first, changed, "-o", output)
    )
    assert "cannot be read" in error_of(cli("join", first, tmp_path / "none.jsonl", "-o", output))
    assert "rows are a .jsonl or .jsonl.xz file" in error_of(cli("join", first, "-o", tmp_path / "all.html"))
    assert "is one of the files to join" in error_of(cli("join", first, second, "-o", first, "--force"))
    assert "exists already" in error_of(cli("join", first, second, "-o", other))
    assert not output.exists()
    with pytest.raises(ConfigError, match="at least one file"):
        join([], output)
