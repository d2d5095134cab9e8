"""Time one denoising step of true-sized models, stock and accelerated, on a few layers with random weights.

    python -m dit_accel.eval.bench_step [--cases NAME...] [--densities D...] [--recipe NAME] [--out FOLDER]
        [--compiled [BACKEND]] [--tiny]

Both run in one process on the same inputs, in bf16, stock with cuDNN's attention where it takes the call. Before a case
is timed, its first attention layer is run on a plan that holds all pairs and held against stock. A step is
extrapolated: the median time of a block of each kind times the real number of such blocks, plus all that lies outside
of the blocks. The accelerated step is timed deciding anew in every layer, which is the dearest way, and again with
decisions kept; `paced` is the mean over as many steps as the recipe keeps one (its own `every`). What a decision costs
alone, and what it costs to expand a kept one, stands in columns of its own. Amdahl's bound is the
step with stock's attention time multiplied by the density and everything else as it was; where stock's attention is
slowed by a mask that ours leaves out (HunyuanVideo), it can be passed, and `sdpa_ms` tells the maskless time. Rows are
written as they come; rows of other cases from the same commit, device and versions are kept. `--compiled` times each
case once more with its repeated blocks compiled, stock and accelerated (`eval/step_compiled.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from dit_accel import accelerate
from dit_accel.attend import run
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.eval.step_cases import CASES, Case, tiny
from dit_accel.eval.step_clock import StepTime
from dit_accel.eval.step_compiled import Compiled, compiled_steps
from dit_accel.eval.step_model import STEPS, Bench, all_pairs
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve

DENSITIES = (0.5, 0.3, 0.2, 0.1)
WORST_ERROR = 1e-2  # of one bf16 attention layer; a wrong mask, order or rotation is far above


@dataclass(frozen=True)
class Row:
    """One line: a case at one density. Times in ms; `layer` means one attention of the first kind of block.

    `step_ms` and `stock_step_ms` are extrapolated to the full depth; `bound` is Amdahl's; `decision_ms`: choosing the
    pairs; `reuse_ms`: expanding a kept choice; `kernel_ms`: the sparse kernel; `sdpa_ms`: dense attention without a
    mask on the same queries and keys; `stock_layer_ms`: stock's own attention call, mask included. `kept_step_ms`: a
    step that takes over decisions, `every` the steps for which the recipe keeps one. `compiled` holds the same step
    with compiled blocks, where that was timed.
    """

    case: str
    tokens: int
    asked: float
    density: float
    stock_step_ms: float
    step_ms: float
    speedup: float
    bound: float
    attention_share: float
    stock_layer_ms: float
    sdpa_ms: float
    kernel_ms: float
    decision_ms: float
    reuse_ms: float
    error: float
    stock_backend: str
    measured_layers: int
    depth: int
    compiled: Compiled | None = None
    kept_step_ms: float | None = None
    every: int = 1

    @property
    def paced(self) -> float | None:
        """Times faster than stock over the life of a decision; None where no kept step was timed."""
        if self.kept_step_ms is None:
            return None
        return self.stock_step_ms * self.every / (self.step_ms + (self.every - 1) * self.kept_step_ms)


def checked_error(bench: Bench, recipe: Recipe) -> tuple[float, int]:
    """Hold the first attention layer, run on all pairs, against stock; return its relative error and the tokens.

    Raises RuntimeError when the error is no rounding, or not all pairs were computed.
    """
    stock = bench.first_layer()
    with accelerate(bench.model, all_pairs(recipe)) as handle:
        handle.step(0, STEPS, "cond")
        ours = bench.first_layer()
        report = handle.report()
    error = float((ours.float() - stock.float()).norm() / stock.float().norm())
    if report.sparse_calls != report.calls or report.density < 0.9999:
        raise RuntimeError(f"{bench.case.name}: not all pairs went through our kernel:\n{report}")
    if not error < WORST_ERROR:
        raise RuntimeError(f"{bench.case.name}: relative error {error} of the first layer on all pairs")
    cells = stock.shape[1]
    return error, cells


def measure(bench: Bench, recipe: Recipe, every: int, tokens: int, stock: StepTime, error: float, backend: str) -> Row:
    """Time one density of a checked case."""
    kept: list[AttentionCall] = []

    def keep_first(call: AttentionCall) -> AttentionCall:
        kept[:] = kept or [call]
        return call

    with accelerate(bench.model, recipe) as handle:
        handle.stages = (keep_first,)
        handle.step(0, STEPS, "cond")
        bench.forward()  # compiles
        handle.stages = ()
        ours = bench.timed(lambda index: handle.step(index + 1, STEPS, "cond"))
        density = handle.report().density
    with accelerate(bench.model, recipe.override(every=STEPS)) as handle:
        handle.step(0, STEPS, "cond")
        bench.forward()  # decides
        later = bench.timed(lambda index: handle.step(index + 1, STEPS, "cond"))
    parts = layer_parts(bench, recipe, kept[0])
    bound = stock.step / (stock.step - stock.attention * (1 - density))
    return Row(
        case=bench.case.name,
        tokens=tokens,
        asked=recipe.density or 1.0,
        density=density,
        stock_step_ms=stock.step,
        step_ms=ours.step,
        speedup=stock.step / ours.step,
        bound=bound,
        attention_share=stock.attention / stock.step,
        stock_layer_ms=stock.layer,
        **parts,
        error=error,
        stock_backend=backend,
        measured_layers=bench.case.layers * len(bench.case.groups),
        depth=bench.case.depth,
        kept_step_ms=later.step,
        every=every,
    )


def layer_parts(bench: Bench, recipe: Recipe, call: AttentionCall) -> dict[str, float]:
    """Time the parts of one accelerated attention call alone: decision, reuse of one, kernel; and dense attention."""
    planner = Planner(recipe)
    plan = planner.plan(call)
    reusing = Planner(recipe.override(every=2))
    reusing.plan(call)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))

    def dense() -> torch.Tensor:
        with bench.chosen_backends():
            return F.scaled_dot_product_attention(q, k, v)

    return {
        "sdpa_ms": bench.median_ms(dense),
        "kernel_ms": bench.median_ms(lambda: run(plan, call.q, call.k, call.v, call.scale, call.key_bias)),
        "decision_ms": bench.median_ms(lambda: planner.plan(call)),
        "reuse_ms": bench.median_ms(lambda: reusing.plan(call)),
    }


@torch.no_grad()
def run_case(case: Case, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Build, check and time one case, a row a density; each row comes again when its compiled step was timed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipe = resolve(options.recipe, density=options.densities[0], dense_steps=0, dense_layers=0)
    recipe, every = recipe.override(every=1), recipe.every
    bench = Bench(case, device, dtype, options.repeats)
    backend = bench.choose_backends()
    error, cells = checked_error(bench, recipe)
    joint = len(case.groups) > 1  # text lies in the same sequence
    tokens = cells + (case.text if joint else 0)
    stock = bench.timed_stock(tokens)
    rows = []
    for density in options.densities:
        rows.append(measure(bench, recipe.override(density=density), every, tokens, stock, error, backend))
        yield rows[-1]
    if options.compiled:
        recipes = [recipe.override(density=density) for density in options.densities]
        for row, compiled in zip(rows, compiled_steps(bench, recipes, stock, options.compiled), strict=True):
            yield replace(row, compiled=compiled)


def table(rows: Sequence[Row]) -> Table:
    """Lay rows out for reading; times of steps in seconds, of layers in ms."""
    shown = Table(title="one denoising step, extrapolated to the full depth", caption=_CAPTION)
    for name in (
        "case", "density", "stock s", "ours s", "speedup", "paced", "Amdahl", "attention", "stock layer", "no mask",
        "kernel", "decision", "reuse", "error",
    ):  # fmt: skip
        shown.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for r in rows:
        shown.add_row(
            r.case,
            f"{r.density:.3f}",
            f"{r.stock_step_ms / 1e3:.3f}",
            f"{r.step_ms / 1e3:.3f}",
            f"{r.speedup:.2f}x",
            f"{r.paced:.2f}x" if r.paced else "",
            f"{r.bound:.2f}x",
            f"{r.attention_share:.0%}",
            *(f"{x:.2f}" for x in (r.stock_layer_ms, r.sdpa_ms, r.kernel_ms, r.decision_ms, r.reuse_ms)),
            f"{r.error:.1e}",
        )
    return shown


def compiled_table(rows: Sequence[Row]) -> Table:
    """Lay out the steps with compiled blocks beside the eager ones, in seconds."""
    shown = Table(title="the same step, repeated blocks compiled", caption=_COMPILED_CAPTION)
    for name in ("case", "density", "stock s", "ours s", "speedup", "Amdahl", "to eager stock", "error"):
        shown.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for r in rows:
        if (c := r.compiled) is not None:
            speedups = (c.speedup, c.bound, r.stock_step_ms / c.step_ms)
            times = (f"{c.stock_step_ms / 1e3:.3f}", f"{c.step_ms / 1e3:.3f}", *(f"{x:.2f}x" for x in speedups))
            shown.add_row(r.case, f"{c.density:.3f}", *times, f"{c.error:.1e}")
    return shown


_COMPILED_CAPTION = "error: of the first attention over all pairs, compiled against eager"
_CAPTION = (
    "paced: over the life of a decision; attention: its share of the stock step; of one layer, in ms: stock's "
    "attention call, dense attention without a mask, our kernel, a decision, a kept decision used again"
)


def read_row(row: dict[str, Any]) -> Row:
    """Make a row of what a file holds of it."""
    compiled = row.get("compiled")
    return Row(**{**row, "compiled": Compiled(**compiled) if compiled else None})


def kept_rows(path: Path, source: dict[str, Any], cases: Sequence[str]) -> list[Row]:
    """Return the rows of other cases in an earlier file that was made from the same commit, device and versions."""
    try:
        old = json.loads(path.read_text())
        same = all(old[key] == source[key] for key in source if key != "date")
        return [read_row(row) for row in old["rows"] if row["case"] not in cases] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(path: Path, source: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write all rows, by way of a second file so that a half-written one is never left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps({**source, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    half.replace(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which models to time")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--recipe", default="balanced", help="recipe or preset that decides")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts")
    parser.add_argument(
        "--compiled", nargs="?", const="inductor", default="", metavar="BACKEND", help="time compiled blocks, too"
    )
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    parser.add_argument("--tiny", action="store_true", help="tiny twins of the models, on any device")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        sys.exit("this benchmark needs a CUDA device; --tiny runs the same path anywhere")
    torch.manual_seed(0)
    chosen = [case for case in CASES if case.name in options.cases]
    if options.tiny:
        chosen = [tiny(case) for case in chosen]
    source = {**provenance(device, options.commit), "recipe": options.recipe, "repeats": options.repeats}
    kind = "step_tiny" if options.tiny else "step"
    path = options.out / f"{kind}_{'-'.join(source['gpu'].lower().split())}.json"
    rows = kept_rows(path, source, [case.name for case in chosen])
    console, failed = Console(width=180), []
    for case in chosen:
        try:
            for row in run_case(case, options, device):
                rows = [old for old in rows if (old.case, old.asked) != (row.case, row.asked)] + [row]
                write(path, source, rows)
                kind, timed = ("compiled", row.compiled) if row.compiled else ("eager", row)
                shown = f"{row.case} at {timed.density:.3f}, {kind}: {timed.speedup:.2f}x of {timed.bound:.2f}x"
                console.print(shown, highlight=False)
        except RuntimeError as error:  # the other cases can still run
            failed.append(case.name)
            console.print(f"{case.name} failed: {error}", highlight=False, markup=False)
        gc.collect()
        torch.cuda.empty_cache()
    console.print(table(rows))
    if any(row.compiled for row in rows):
        console.print(compiled_table(rows))
    console.print(f"written: {path}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
