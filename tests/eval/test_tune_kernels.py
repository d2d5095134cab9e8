"""Tuning: right tiles in by a stub clock, wrong ones out, time and interrupts, and the command around it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import error_of
from torch import Tensor
from typer.testing import CliRunner, Result

from dit_accel.eval import tune_cases, tune_job, tune_kernels
from dit_accel.eval.cli import app
from dit_accel.eval.tune_cases import FLAVOURS, Case
from dit_accel.kernels.block_sparse import tuned
from dit_accel.kernels.block_sparse.problem import Problem
from dit_accel.kernels.block_sparse.reference import attend as reference
from dit_accel.kernels.block_sparse.tiles import Kind, Tile
from dit_accel.pipelines import doctor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

CPU = torch.device("cpu")
CASE = Case("as given", "plain", 64, 32, 32, tokens=160, heads=1)
PRESENT = Tile(32, 32, 4, 2)
FAST, FASTER = Tile(32, 32, 4, 3), Tile(32, 32, 4, 4)
Attend = Callable[[Problem, Tile], tuple[Tensor, Tensor]]


def clock(run: Any) -> float:
    """Take 3 ms for the present tile, 2 for the fast one, 1 for the faster one, 9 for all others."""
    return {PRESENT: 3.0, FAST: 2.0, FASTER: 1.0}.get(run.args[1], 9.0)


def tuned_case(case: Case = CASE, clock: tune_kernels.Clock = clock, seconds: float = 1e9) -> tune_kernels.Outcome:
    (one,) = tune_kernels.tune_all([case], CPU, seconds, clock, lambda _: None, torch.float16)
    return one


def spoil(monkeypatch: pytest.MonkeyPatch, tile: Tile, how: Attend) -> None:
    """Let one tile be run by other code."""
    monkeypatch.setattr(tune_cases, "attend", lambda problem, t: (how if t == tile else right)(problem, t))


KERNEL = tune_cases.attend


def right(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    return reference(problem)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reference stand for the kernel, which is slow in the interpreter; one test takes it itself."""
    monkeypatch.setattr(tune_cases, "attend", right)


def misses_a_block(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    short = problem.count - 1
    return right(replace(problem, count=short, full_count=short), tile)


def leaves_a_row(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    out, lse = right(problem, tile)
    out[0, 0] = float("nan")
    return out, lse


def does_not_fit(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def wrong_when_ragged(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    return (misses_a_block if problem.q.shape[1] % problem.block_k else right)(problem, tile)


@pytest.fixture
def races() -> Attend:
    calls = itertools.count()

    def run(problem: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
        out, lse = right(problem, tile)
        out[0, -1] *= 1 + next(calls) % 2 * 1e-3  # small enough for the tolerance
        return out, lse

    return run


KINDS: list[tuple[str, Kind]] = [("as given", kind) for kind in FLAVOURS] + [("int8", "holes"), ("int8", "plain")]


@pytest.mark.parametrize(("precision", "kind"), KINDS)
def test_every_call_has_a_reference_that_can_fail(precision: Any, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_cases, "attend", KERNEL)
    case = replace(CASE, precision=precision, kind=kind, tokens=192, block_q=64, heads=2)
    calls = tune_kernels.Calls(case, CPU, torch.float16)
    tile = tune_kernels.present(case, calls)
    for number in range(len(FLAVOURS[kind])):
        problem, gold = calls.made(number)
        assert calls.error(tile, number) < 1e-3
        assert len(gold.rows) > 64
        whole = problem.full_count is problem.count
        short = problem.count - 1
        wrong = replace(problem, count=short, full_count=short if whole else problem.full_count)
        assert not tune_cases.error(wrong, gold, tile) < tune_cases.WORST_ERROR


def test_the_fastest_right_tile_wins() -> None:
    one = tuned_case()
    assert (one.before, one.tile, one.before_ms, one.ms) == (PRESENT, FASTER, 3.0, 1.0)
    assert one.whole
    assert not one.dropped
    entry = one.entry()
    assert (entry.key, entry.tile.stages) == (("as given", "plain", 64, 32, 32), 4)
    assert 0 < entry.error < 1e-3


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (misses_a_block, "wrong, error"),
        (leaves_a_row, "wrong, error nan"),
        (does_not_fit, "out of resource: shared memory"),
        (wrong_when_ragged, "wrong on a call that is ragged"),
    ],
)
def test_a_tile_that_is_wrong_or_does_not_run_is_left_out(
    monkeypatch: pytest.MonkeyPatch, how: Attend, why: str
) -> None:
    spoil(monkeypatch, FASTER, how)
    one = tuned_case()
    assert one.tile == FAST
    (said,) = one.dropped
    assert said.startswith(tune_kernels.shown(FASTER))
    assert why in said


def test_two_runs_that_differ_are_left_out(monkeypatch: pytest.MonkeyPatch, races: Attend) -> None:
    spoil(monkeypatch, FASTER, races)
    assert tuned_case().tile == FAST


def test_a_present_tile_that_is_wrong_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, PRESENT, does_not_fit)
    one = tuned_case()
    assert (one.before_ms, one.tile) == (None, FASTER)
    assert one.entry().before_ms is None


def test_luck_does_not_count() -> None:
    """A tile that was fast once and not when old and new take turns."""
    seen: dict[Tile, int] = {}

    def lucky(run: Any) -> float:
        tile = run.args[1]
        seen[tile] = seen.get(tile, 0) + 1
        return 2.0 if tile == FASTER and seen[tile] == 1 else 3.0

    one = tuned_case(clock=lucky)
    assert not one.better
    assert (one.tile, one.ms) == (PRESENT, 3.0)


def test_time_is_shared_and_what_was_found_is_kept() -> None:
    """Each look at the clock takes a second."""

    def run(seconds: float) -> list[tune_kernels.Outcome]:
        times = itertools.count()
        cases = [replace(CASE, kind=kind) for kind in ("plain", "holes", "bias")]

        return list(
            tune_kernels.tune_all(cases, CPU, seconds, clock, lambda _: None, torch.float16, lambda: float(next(times)))
        )

    found = run(12)
    assert [(one.tried, one.whole) for one in found] == [(3, False), (2, False), (1, False)]
    assert found[0].tile == FAST
    assert len(run(5)) == 2
    assert run(0) == []


def test_a_dead_device_ends_it() -> None:
    found = tune_kernels.Outcome(CASE, PRESENT, 1.0, PRESENT, 1.0, 0.0, dropped=["64x64: illegal address"])
    with pytest.raises(tune_kernels.DeadDeviceError, match="64x64: illegal address"):
        tune_kernels._check_alive(torch.device("meta"), found)


def test_candidates_are_new_and_fit() -> None:
    for case, capability in itertools.product(tune_cases.CASES, ((8, 0), (8, 6), (9, 0))):
        before = Tile(case.block_q, 64, 4, 3, tma=capability == (9, 0))
        found = tune_cases.candidates(case, before, capability)
        assert len(found) == len(set(found)) > 5
        assert before not in found
        assert all(tile.q <= case.block_q and tile.k <= case.block_k for tile in found)
        assert any(tile.tma for tile in found) == (capability == (9, 0) and case.kind != "bias")
    names = [case.name for case in tune_cases.CASES]
    assert len(names) == len(set(names))


# --- the command ---


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command where the CPU is a GPU with a name, on two tiny calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "Made GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_job, "_device", lambda: CPU)
    monkeypatch.setattr(tune_job, "CASES", (CASE, replace(CASE, kind="holes")))
    monkeypatch.setattr(tune_job, "gpu_clock", clock)
    tuned.forget()
    return lambda *arguments: CliRunner().invoke(app, ["tune-kernels", *map(str, arguments)])


def test_round_trip(cli: Callable[..., Result]) -> None:
    """Committed, measured, used, said by the doctor, and back."""
    first, second = tune_job.CASES
    path = tuned.path("Made GPU")
    assert "committed table" in doctor._tiles().found
    result = cli("--case", first.name, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["output"], data["gpu"]) == (str(path), "Made GPU")
    (row,) = data["cases"]
    assert (row["case"], row["before_ms"], row["ms"], row["tile"]["stages"]) == (first.name, 3.0, 1.0, 4)
    assert tuned.tile_for(CPU, "as given", "plain", 64, 32, 32) == FASTER
    shown = cli("--case", second.name)  # the first stays in the table
    assert "3.00x" in shown.stdout
    table = tuned.read(path)
    assert table is not None
    assert [entry.kind for entry in table.tiles] == ["plain", "holes"]
    assert (table.gpu, table.triton, table.misfit("Made GPU")) == ("Made GPU", tuned.triton_version(), "")
    assert "2 measured on this GPU" in doctor._tiles().found
    again = cli("--case", first.name)  # nothing is faster than what is in use by now
    assert "kept" in again.stdout
    assert "removed" in cli("--reset").stdout
    assert not path.exists()
    assert tuned.tile_for(CPU, "as given", "plain", 64, 32, 32) is None
    assert "there is none" in cli("--reset").stdout


def test_a_file_of_ones_own_is_not_used(cli: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert cli("--out", out).exit_code == 0
    table = tuned.read(out)
    assert table is not None
    assert len(table.tiles) == 2
    assert tuned.tile_for(CPU, "as given", "plain", 64, 32, 32) is None


def test_an_interrupt_keeps_what_was_found(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run: Any) -> float:
        if run.args[0].splits:  # the second case
            raise KeyboardInterrupt
        return clock(run)

    monkeypatch.setattr(tune_job, "gpu_clock", stopped)
    result = cli()
    assert result.exit_code == 0
    assert "stopped, 1 cases are kept" in result.stderr
    assert "1 cases were not reached" in result.stdout
    assert tuned.tile_for(CPU, "as given", "plain", 64, 32, 32) == FASTER


def test_a_malformed_table_is_refused_until_reset(cli: Callable[..., Result]) -> None:
    path = tuned.path("Made GPU")
    path.parent.mkdir(parents=True)
    path.write_text('{"format": 1}')
    assert "gpu: field required" in error_of(cli())
    found = doctor._tiles()
    assert found.status == "fail"
    assert "gpu: field required" in found.found
    assert "removed" in cli("--reset").stdout
    assert doctor._tiles().status == "ok"


def test_a_table_for_another_triton_is_said_and_replaced(cli: Callable[..., Result]) -> None:
    first, _ = tune_job.CASES
    assert cli("--case", first.name).exit_code == 0
    path = tuned.path("Made GPU")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "triton": "1.0"}))
    tuned.forget()
    found = doctor._tiles()
    assert found.status == "warn"
    assert "triton was 1.0" in found.found
    assert cli("--case", tune_job.CASES[1].name).exit_code == 0
    table = tuned.read(path)
    assert table is not None
    assert [entry.kind for entry in table.tiles] == ["holes"]


def test_calls_that_the_hopper_kernel_takes_are_left_out(
    cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_cases, "_for_hopper", lambda problem: problem.splits)
    first, second = tune_job.CASES
    data = json.loads(cli("--json").stdout)
    assert [row["case"] for row in data["cases"]] == [first.name]
    assert "all of these calls run on the Hopper kernel" in error_of(cli("--case", second.name))


def test_what_cannot_be_tuned_is_refused(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Did you mean 'plain-d64-32x32'?" in error_of(cli("--case", "plain-d64-32x23"))
    monkeypatch.undo()
    refused = CliRunner().invoke(app, ["tune-kernels"])
    assert "no CUDA device" in error_of(refused)
