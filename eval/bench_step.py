"""Time one denoising step of true-sized models, stock and accelerated, on a few layers with random weights.

    python -m dit_accel.eval.bench_step [--cases NAME...] [--densities D...] [--recipe NAME] [--out FOLDER] [--tiny]

Both run in one process on the same inputs, in bf16, stock with cuDNN's attention where it takes the call. Before a case
is timed, its first attention layer is run on a plan that holds all pairs and held against stock. A step is
extrapolated: the median time of a block of each kind times the real number of such blocks, plus all that lies outside
of the blocks. The accelerated step decides anew in every layer at every step (every=1), which is the dearest way;
what a decision costs, and what it costs to expand a kept one, stands in columns of its own. Amdahl's bound is the
step with stock's attention time multiplied by the density and everything else as it was; where stock's attention is
slowed by a mask that ours leaves out (HunyuanVideo), it can be passed, and `sdpa_ms` tells the maskless time. Rows are
written as they come; rows of other cases from the same commit, device and versions are kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import accelerate
from dit_accel.attend import run
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.eval.step_cases import CASES, Case, built, tiny
from dit_accel.eval.step_clock import AttentionClock, StepTime, Stopwatch, extrapolate
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve

DENSITIES = (0.5, 0.3, 0.2, 0.1)
WORST_ERROR = 1e-2  # of one bf16 attention layer; a wrong mask, order or rotation is far above
STEPS = 1000  # of the pretended run; far more than are taken, so that no new run begins


@dataclass(frozen=True)
class Row:
    """One line: a case at one density. Times in ms; `layer` means one attention of the first kind of block.

    `step_ms` and `stock_step_ms` are extrapolated to the full depth; `bound` is Amdahl's; `decision_ms`: choosing the
    pairs; `reuse_ms`: expanding a kept choice; `kernel_ms`: the sparse kernel; `sdpa_ms`: dense attention without a
    mask on the same queries and keys; `stock_layer_ms`: stock's own attention call, mask included.
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


class Bench:
    """One case on one device: the model, its inputs, and the clocks on its blocks."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        self.case, self.device, self.repeats = case, device, repeats
        self.model: Any = built(case, device, dtype)
        self.inputs = case.inputs(device, dtype)
        self.watch = Stopwatch(device)
        self.backends: list[SDPBackend] | None = None
        self._clock: AttentionClock | None = None
        for name in case.groups:
            for block in getattr(self.model, name):
                self._time_block(name, block)

    @property
    def site(self) -> Any:
        """The first attention module a recipe may speak for."""
        block = getattr(self.model, next(iter(self.case.groups)))[0]
        return block.attn1 if hasattr(block, "attn1") else block.attn

    def _time_block(self, name: str, block: torch.nn.Module) -> None:
        started: list[Any] = []

        def before(*_: Any) -> None:
            if self._clock is not None:
                self._clock.kind = name
            started.append(self.watch.mark())

        block.register_forward_pre_hook(before)
        block.register_forward_hook(lambda *_: self.watch.add(name, started.pop()))

    def forward(self) -> None:
        """Run the transformer once under the chosen attention backends."""
        with self.chosen_backends(), self.watch.span("forward"):
            self.model(**self.inputs, return_dict=False)

    def chosen_backends(self) -> Any:
        """Make torch's attention use the backends that stock was found to run with."""
        return nullcontext() if self.backends is None else sdpa_kernel(self.backends, set_priority=True)

    def choose_backends(self) -> str:
        """Take cuDNN's attention alone where the whole model runs with it, else first of several; say which."""
        if self.device.type != "cuda":
            return "torch's default"
        self.backends = [SDPBackend.CUDNN_ATTENTION]
        try:
            self.forward()
        except RuntimeError as error:
            print(f"{self.case.name}: cuDNN alone does not run this model ({str(error).splitlines()[0]})", flush=True)
            self.backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            self.forward()
        return ", then ".join(backend.name.split("_")[0].lower() for backend in self.backends)

    def timed(self, before: Callable[[int], None] | None = None) -> StepTime:
        """Run once to warm up and then `repeats` times; return the medians, scaled to the full depth."""
        for index in range(self.repeats + 1):
            if before is not None:
                before(index)
            self.forward()
            if index == 0:
                self.watch.read()
        return extrapolate(self.watch.read(), self.case.groups, self.case.layers)

    def timed_stock(self, tokens: int) -> StepTime:
        """Time the stock model, and in it the attentions over all `tokens`."""
        self._clock = AttentionClock(self.watch, tokens)
        with self._clock:
            try:
                return self.timed()
            finally:
                self._clock = None

    def first_layer(self) -> torch.Tensor:
        """Return what the first attention gives the picture or video tokens, [B, S, C]."""
        seen: list[Any] = []
        hook = self.site.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            self.forward()
        finally:
            hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def median_ms(self, call: Callable[[], Any]) -> float:
        """Time a call alone: the median of `repeats` runs after one to warm up."""
        for index in range(self.repeats + 1):
            with self.watch.span("call"):
                call()
            if index == 0:
                self.watch.read()
        return statistics.median(self.watch.read()["call"])


def checked_error(bench: Bench, recipe: Recipe) -> tuple[float, int]:
    """Hold the first attention layer, run on all pairs, against stock; return its relative error and the tokens.

    Raises RuntimeError when the error is no rounding, or not all pairs were computed.
    """
    stock = bench.first_layer()
    every = recipe.override(score={"kind": "geometry"}, select={"kind": "within", "radius": 4096}, name="all pairs")
    with accelerate(bench.model, every) as handle:
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


def measure(bench: Bench, recipe: Recipe, tokens: int, stock: StepTime, error: float, backend: str) -> Row:
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
    """Build, check and time one case, a row a density."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipe = resolve(options.recipe, density=options.densities[0], dense_steps=0, dense_layers=0, every=1)
    bench = Bench(case, device, dtype, options.repeats)
    backend = bench.choose_backends()
    error, cells = checked_error(bench, recipe)
    joint = len(case.groups) > 1  # text lies in the same sequence
    tokens = cells + (case.text if joint else 0)
    stock = bench.timed_stock(tokens)
    for density in options.densities:
        yield measure(bench, recipe.override(density=density), tokens, stock, error, backend)


def table(rows: Sequence[Row]) -> Table:
    """Lay rows out for reading; times of steps in seconds, of layers in ms."""
    shown = Table(title="one denoising step, extrapolated to the full depth", caption=_CAPTION)
    for name in (
        "case", "density", "stock s", "ours s", "speedup", "Amdahl", "attention", "stock layer", "no mask", "kernel",
        "decision", "reuse", "error",
    ):  # fmt: skip
        shown.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for r in rows:
        shown.add_row(
            r.case,
            f"{r.density:.3f}",
            f"{r.stock_step_ms / 1e3:.3f}",
            f"{r.step_ms / 1e3:.3f}",
            f"{r.speedup:.2f}x",
            f"{r.bound:.2f}x",
            f"{r.attention_share:.0%}",
            *(f"{x:.2f}" for x in (r.stock_layer_ms, r.sdpa_ms, r.kernel_ms, r.decision_ms, r.reuse_ms)),
            f"{r.error:.1e}",
        )
    return shown


_CAPTION = (
    "attention: its share of the stock step; of one layer, in ms: stock's attention call, dense attention without a "
    "mask, our kernel, a decision, a kept decision used again"
)


def kept_rows(path: Path, source: dict[str, Any], cases: Sequence[str]) -> list[Row]:
    """Return the rows of other cases in an earlier file that was made from the same commit, device and versions."""
    try:
        old = json.loads(path.read_text())
        same = all(old[key] == source[key] for key in source if key != "date")
        return [Row(**row) for row in old["rows"] if row["case"] not in cases] if same else []
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
                rows.append(row)
                write(path, source, rows)
                shown = f"{row.case} at {row.density:.3f}: {row.speedup:.2f}x of {row.bound:.2f}x"
                console.print(shown, highlight=False)
        except RuntimeError as error:  # the other cases can still run
            failed.append(case.name)
            console.print(f"{case.name} failed: {error}", highlight=False, markup=False)
        gc.collect()
        torch.cuda.empty_cache()
    console.print(table(rows))
    console.print(f"written: {path}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
