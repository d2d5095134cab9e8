"""Count and time what a planned attention call costs beside its own attention, recipe by recipe and stage by stage.

    python -m dit_accel.eval.bench_decide [--recipes NAME...] [--case NAME] [--repeats N] [--out FOLDER] [--commit HASH]
    python -m dit_accel.eval.bench_decide --count [--recipes NAME...]
    python -m dit_accel.eval.bench_decide --tiny

`--count` lists what a GPU would be given to launch in one call (torch's operations that are no views, and Triton's
kernels); it runs anywhere, with an H100's tiles. Without it the stages are timed beside torch's dense attention (cuDNN
where it takes the call) in the same run: on the host, until all is launched; by events in eager mode, as the call
passes; and by events behind a sleep, what the GPU itself needs. Before a recipe is timed, its plan's result is held
against float64 on sampled queries, and its decision against that of torch's own operations; a wrong one is not timed.
The share of dense counts order, score, selection, the plan's lists and the correction, spread over a run of 50 steps
and 40 layers as the recipe's reuse has it. Random inputs: rules that follow the mass of attention (top-p) take more
pairs here than in a model. `--tiny` walks the same path on any device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.eval.decide_calls import (
    CASES,
    COUNTED,
    KINDS,
    TINY,
    Calls,
    Case,
    always_sparse,
    sampled_error,
    shrunk,
    uses,
)
from dit_accel.eval.decide_stages import DECISION, STAGES, Clock, Launches
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.kernels.choice import prefer

WORST_ERROR = 1e-2  # of bf16 operands; a wrong mask or a race is far above
WORST_DIFFERENCE = 1e-3  # share of unit pairs decided otherwise than by torch: means are rounded in another order
WORST_BY_ERROR = 1e-2  # where errors choose: the kernel rounds mean queries, and on random inputs all errors are alike
MS_PER_RECIPE = 20_000  # no more repeats beyond this
CYCLES_PER_MS = 2_000_000  # of a GPU's clock, at most

Ms = dict[str, float]


@dataclass(frozen=True)
class Times:
    """One kind of call by stage, in ms: on the host, as it passes, on the device alone; and what it launched."""

    calls: int
    host: Ms
    eager: Ms
    device: Ms
    launches: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One recipe. `share`, `device_share`: decision as it passes, and on the device alone, over dense attention.

    `hopper`: whether the kernel for Hopper was there, so that kernel times of rows can be told apart.

    `decision_ms`: a mean call's order, score, selection, lists and correction; `kinds`: see `KINDS`.
    """

    recipe: str
    density: float
    error: float
    differs: float
    dense_ms: float
    decision_ms: float
    share: float
    device_share: float
    peak_gib: float
    hopper: bool
    kinds: dict[str, Times] = field(default_factory=dict)


# Counting ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def counted(calls: Calls, kind: str) -> Launches:
    """Count the launches of one call of a kind; what can be cached is made by one before it."""
    launches = Launches()
    with launches.watching():
        calls.attend(calls.prepared(kind))
        call = calls.prepared(kind)
        launches.by_stage.clear()
        calls.attend(call)
    return launches


@contextmanager
def as_on_an_h100() -> Iterator[None]:
    """Give any device the kernels that an H100 would be given for half precision, 128 channels and large blocks."""
    from dit_accel.kernels.block_sparse import tiles, triton

    def tile(problem: Any) -> tiles.Tile:
        return tiles.choose((9, 0), 128, 2, 128, 64, triton.kind_of(problem))

    with prefer("triton"), patch.object(triton, "_tile_for", tile):
        yield


def count(names: Sequence[str], case: Case) -> Table:
    """Return the launches of each recipe's kinds of calls, on small units."""
    table = Table(title="launches of one planned call", box=box.MARKDOWN)
    for name in ("recipe", "call", "of a run", *STAGES, "all"):
        table.add_column(name, justify="left" if name in ("recipe", "call") else "right", no_wrap=True)
    for name in names:
        kinds, calls = uses(always_sparse(name)), Calls(shrunk(name), case, torch.device("cpu"), torch.bfloat16)
        if calls.recipe.order.kind == "kmeans":  # more iterations are all that sets the first call of a run apart
            kinds.pop("first")
        for kind, times in kinds.items():
            with as_on_an_h100():
                got = counted(calls, kind)
            shown = (str(got.total(stage) or "") for stage in STAGES)
            table.add_row(name, kind, str(times), *shown, str(got.total()))
    return table


# Checking ----------------------------------------------------------------------------------------------------------
def difference(calls: Calls) -> float:
    """Return which share of the unit pairs torch's own operations decide otherwise.

    0 without looking for rules of places, and where near ties change everything: clusters, and heads that choose.
    """
    from dit_accel.sparsity.decide import decide
    from dit_accel.sparsity.inputs import Inputs

    recipe = calls.recipe
    if not recipe.content_driven or recipe.heads is not None or recipe.order.kind == "kmeans":
        return 0.0
    call = calls.prepared("first")
    inputs = Inputs(call.layout, call.q, call.k, call.v, call.scale)
    ours = decide(recipe, inputs)
    with prefer("reference"):
        theirs = decide(recipe, inputs)
    return float((ours.mask != theirs.mask).float().mean())


def checked(calls: Calls) -> tuple[float, float]:
    """Return a recipe's error and how much of its decision differs; raise RuntimeError when that is no rounding."""
    error, differs = sampled_error(calls), difference(calls)
    if not error < WORST_ERROR:
        raise RuntimeError(f"relative error {error:.1e} on sampled queries")
    if not differs < (WORST_BY_ERROR if calls.recipe.select.kind == "error" else WORST_DIFFERENCE):
        raise RuntimeError(f"{differs:.1e} of the unit pairs are decided otherwise than by torch")
    return error, differs


# Timing ------------------------------------------------------------------------------------------------------------
def dense_ms(calls: Calls, repeats: int) -> float:
    """Time torch's dense attention on the same inputs, by cuDNN where it takes them."""
    q, k, v = (x.transpose(1, 2) for x in calls.qkv)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    chosen = sdpa_kernel(order, set_priority=True) if calls.device.type == "cuda" else nullcontext()
    spans = []
    with chosen:
        for _ in range(repeats + 1):
            spans.append(sum(Clock(calls.device).run(lambda: F.scaled_dot_product_attention(q, k, v))[1].values()))
    return statistics.median(spans[1:])


def timed(calls: Calls, kind: str, times: int, repeats: int) -> Times:
    """Time one kind of call by stage: medians of `repeats` runs."""

    def run(ahead: int) -> tuple[Ms, Ms]:
        call = calls.prepared(kind)
        return Clock(calls.device, ahead).run(lambda: calls.attend(call))

    hosts, eagers, devices, spent = [], [], [], 0.0
    run(0)
    for _ in range(repeats):
        host, eager = run(0)
        ahead = int(1.3 * sum(host.values()) * CYCLES_PER_MS) if calls.device.type == "cuda" else 0
        device = run(ahead)[1]
        hosts.append(host)
        eagers.append(eager)
        devices.append(device)
        spent += sum(eager.values()) + sum(device.values())
        if spent > MS_PER_RECIPE:
            break
    launched = counted(calls, kind)
    launches = {stage: launched.total(stage) for stage in STAGES if launched.total(stage)}
    return Times(times, *(_median(each) for each in (hosts, eagers, devices)), launches)


def _median(runs: Sequence[Ms]) -> Ms:
    names = [*STAGES, ""]
    return {name or "rest": statistics.median(r.get(name, 0.0) for r in runs) for name in names}


def decision(ms: Ms) -> float:
    """Add up what a decision costs of one call's stages."""
    return sum(ms[stage] for stage in DECISION)


@torch.no_grad()
def measure(name: str, case: Case, device: torch.device, repeats: int) -> Row:
    """Check and time one recipe."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    recipe = always_sparse(name)
    calls = Calls(recipe, case, device, torch.bfloat16 if cuda else torch.float32)
    error, differs = checked(calls)
    stock = dense_ms(calls, repeats)
    kinds = {kind: timed(calls, kind, times, repeats) for kind, times in uses(recipe).items()}
    of_run = sum(kind.calls for kind in kinds.values())
    passes, alone = (
        sum(kind.calls * decision(getattr(kind, how)) for kind in kinds.values()) / of_run
        for how in ("eager", "device")
    )
    call = calls.prepared("first")
    return Row(
        recipe=name,
        density=float(calls.engine.planner.plan(call).density()),
        error=error,
        differs=differs,
        dense_ms=stock,
        decision_ms=passes,
        share=passes / stock,
        device_share=alone / stock,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        hopper=cuda and _has_hopper_kernel(),
        kinds=kinds,
    )


def _has_hopper_kernel() -> bool:
    try:
        import dit_accel.kernels.block_sparse.hopper  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return torch.cuda.get_device_capability() == (9, 0)


def table(rows: Sequence[Row], case: Case) -> Table:
    """Lay the rows out: a line for each recipe's kind of call."""
    shown = Table(title=f"planned attention calls, {case.layout}, {case.heads} heads of {case.dim}", caption=_CAPTION)
    left = ("recipe", "call")
    for name in (*left, "of a run", *DECISION, "gather", "fill", "merge", "kernel", "host", "GPU", "launches", "share"):
        shown.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    for row in rows:
        for kind in KINDS:
            if kind not in row.kinds:
                continue
            times, last = row.kinds[kind], kind == list(row.kinds)[-1]
            stages = (times.eager[stage] for stage in (*DECISION, "gather", "fill", "merge", "kernel"))
            shown.add_row(
                row.recipe,
                kind,
                str(times.calls),
                *(f"{ms:.2f}" if ms else "" for ms in stages),
                f"{sum(times.host.values()):.2f}",
                f"{sum(times.device.values()):.2f}",
                str(sum(times.launches.values())),
                f"{row.share:.2%} ({row.device_share:.2%})" if last else "",
            )
    return shown


_CAPTION = (
    "ms as they pass in eager mode; host: until a whole call is launched; GPU: a whole call, launched ahead; share: "
    "order to correct, amortised over the run, of dense attention, in brackets on the GPU alone"
)


# The program -------------------------------------------------------------------------------------------------------
def write(path: Path, source: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write all rows, by way of a second file so that a half-written one is never left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps({**source, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    half.replace(path)


def result_file(folder: Path, case: Case, gpu: str) -> Path:
    """Name the file of a case's results, where `eval/modelled.py` looks for it."""
    return folder / f"decide_{case.name}_{'-'.join(gpu.lower().split())}.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = list(dit_accel.recipes())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=names, default=names)
    parser.add_argument("--case", choices=[case.name for case in CASES], default=CASES[0].name)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    parser.add_argument("--count", action="store_true", help="count launches instead, on a CPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny call, on any device")
    return parser.parse_args(argv)


def measured(
    names: Sequence[str], case: Case, device: torch.device, repeats: int, say: Callable[[str], None]
) -> Iterator[Row]:
    """Yield the rows of all recipes that are right; say which are not."""
    for name in names:
        try:
            yield measure(name, case, device, repeats)
        except (RuntimeError, DitAccelError) as error:  # the others can still run
            say(f"{name} failed: {error}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    console = Console(width=200)
    torch.manual_seed(0)
    if options.count:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which our kernels do later
        console.print(count(options.recipes, COUNTED))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        sys.exit("this benchmark needs a CUDA device; --tiny runs the same path anywhere, --count counts")
    case = TINY if options.tiny else next(case for case in CASES if case.name == options.case)
    source = {**provenance(device, options.commit), "case": case.name, "layout": str(case.layout)}
    path = result_file(options.out, case, source["gpu"])
    rows: list[Row] = []
    for row in measured(options.recipes, case, device, options.repeats, lambda text: console.print(text, markup=False)):
        rows.append(row)
        write(path, source, rows)
        console.print(f"{row.recipe}: {row.share:.2%} of dense attention ({row.dense_ms:.2f} ms)", highlight=False)
    console.print(table(rows, case))
    console.print(f"written: {path}")
    if missing := [name for name in options.recipes if name not in {row.recipe for row in rows}]:
        sys.exit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
