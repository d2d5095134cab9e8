"""Hold a plan's time model against the step benchmark, leave-one-out, and write the table it reads.

    python -m dit_accel.eval.bench_plan [--results FOLDER] [--out FILE]

Reads `step_*.json` of `eval/bench_step.py`, counts on no device what each of its cases does, and models every step of a
case from the rows of all other cases alone. Runs anywhere. Results of fewer than three cases are passed over. A
result's `settings`, written by hand, are those that its recipe had when it was measured, where it has others today.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dit_accel.config import Recipe
from dit_accel.errors import ConfigError
from dit_accel.eval.modelled import RESULTS, step_results
from dit_accel.eval.step_cases import CASES
from dit_accel.hosts import family_of
from dit_accel.planning.models import true_twin
from dit_accel.planning.rates import TABLE, Case, Judged, Point, device, leave_one_out, mean_error
from dit_accel.planning.survey import survey
from dit_accel.planning.times import pooled_keys, whole
from dit_accel.sparsity.decide import tiling_for
from dit_accel.sparsity.recipes import resolve

LEAST_CASES = 3
SOURCE = ("torch", "triton", "diffusers", "commit", "date")


def measured_case(name: str, recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> Case:
    """Put what a case of the step benchmark does beside what its rows say it took."""
    case = next(case for case in CASES if case.name == name)
    model = true_twin(case.model, torch.bfloat16)
    family = family_of(model)
    assert family is not None
    seen = survey(model, model, family, recipe, case.inputs(torch.device("cpu"), torch.bfloat16))
    (call,) = {calls[0] for calls in seen.reached.values()}
    stock = next(iter(seen.work.attention.values()))[0]
    tiling, first = tiling_for(recipe, call.layout), rows[0]
    names = ("density", "step_ms", "kernel_ms", "decision_ms", "reuse_ms")
    return Case(
        case=name,
        matmul=seen.work.matmul,
        traffic=seen.work.traffic,
        our_matmul=seen.ours.matmul,
        our_traffic=seen.ours.traffic,
        flops=stock.flops,
        sites=len(seen.reached),
        tokens=stock.keys,
        heads=call.heads,
        dim=call.dim,
        masked=stock.masked,
        slots=len(tiling.slots),
        units=tiling.units,
        whole=whole(tiling),
        stock_ms=first["stock_step_ms"],
        attention_ms=first["attention_share"] * first["stock_step_ms"],
        sdpa_ms=first["sdpa_ms"],
        points=tuple(Point(**{key: row[key] for key in names}) for row in rows),
        pooled=pooled_keys(recipe, tiling),
    )


def case_names(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in data["rows"]))


def measured_device(data: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one result of the step benchmark into an entry of the plan's table."""
    settings = data.get("settings", {})
    names = case_names(data)
    if len(names) < LEAST_CASES:
        raise ConfigError(f"{data['gpu']}: {len(names)} cases were measured, but leaving one out needs {LEAST_CASES}.")
    recipe = resolve({"base": data["recipe"], **settings})
    cases = [measured_case(n, recipe, [row for row in data["rows"] if row["case"] == n]) for n in names]
    return {
        "gpu": data["gpu"],
        "recipe": data["recipe"],
        "settings": dict(settings),
        "source": {key: data[key] for key in SOURCE},
        "cases": [asdict(case) for case in cases],
    }


def error_table(gpu: str, judged: Sequence[Judged]) -> Table:
    """Lay measured and modelled steps side by side."""
    stock, ours = (mean_error(j for j in judged if (j.density is None) is kind) for kind in (True, False))
    table = Table(
        "case", "density", "measured s", "modelled s", "error", title=f"{gpu}, each case left out of its rates"
    )
    table.caption = f"mean absolute error: {stock:.1%} of stock steps, {ours:.1%} of accelerated steps"
    for one in judged:
        density = "stock" if one.density is None else f"{one.density:.2f}"
        figures = (f"{one.measured_ms / 1e3:.3f}", f"{one.modelled_ms / 1e3:.3f}", f"{one.error:+.1%}")
        table.add_row(one.case, density, *figures)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the step benchmark's results")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write")
    options = parser.parse_args(argv)
    console, made, found = Console(width=110), {}, step_results(options.results)
    enough = [one for one in found if len(case_names(one[1])) >= LEAST_CASES] or found  # none: the first is refused
    for file, _ in (one for one in found if one not in enough):
        console.print(f"{file.name}: fewer than {LEAST_CASES} cases, passed over")
    for file, data in enough:
        made[file.stem.removeprefix("step_")] = entry = measured_device(data)
        console.print(error_table(data["gpu"], leave_one_out(device("", entry).cases)))
    if not made:
        raise SystemExit(f"{options.results} holds no step_*.json of eval/bench_step.py")
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    console.print(f"written: {options.out}")


if __name__ == "__main__":
    main()
