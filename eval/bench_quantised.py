"""Check and time attention on int8 queries and keys beside our kernel as given and cuDNN, with its error on real calls.

    python -m dit_accel.eval.bench_quantised [--out FOLDER] [--cases NAME...] [--tiny] [--commit HASH]

Every timed call is first held, on sampled rows and with poisoned memory, against float64 on the rounded numbers (the
kernel is right) and on the unrounded ones (noise of unit variance, where nothing adds up but the errors). The demo
model's own queries, keys and values, captured at several sites and steps of a run, say what rounding does to a real
call: ‖out - gold‖ / ‖gold‖ on sampled queries of the recipe's own plan. Times are medians, packing included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dit_accel
from dit_accel.attend import run as run_plan
from dit_accel.call import AttentionCall
from dit_accel.eval.bench_block_sparse import Case, computed_pairs, dense_rows, random_lists, sampled_error, tile_order
from dit_accel.eval.bench_fused import median_ms
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.kernels.block_sparse import block_sparse_attention, quantised
from dit_accel.kernels.block_sparse.api import _checked
from dit_accel.sparsity.plan import Plan

WORST_KERNEL = 1e-2  # against the rounded numbers: what bf16 weights and outputs make of it
WORST_NOISE = 4e-2  # against the unrounded ones, on noise
WORST_LSE = 0.1
CASES = [
    Case("video-32k-d128", 32768, 24, 128, (32, 32, 32), (4, 4, 8), ((128, 128), (128, 64)), (0.5, 0.25, 0.10)),
    Case("video-32k-d64", 32768, 40, 64, (32, 32, 32), (4, 4, 8), ((128, 128),), (0.25,)),
    Case("wan-480p-ragged-d128", 32760, 12, 128, blocks=((128, 128),), densities=(0.25,)),
    Case("wan-720p-d128", 75648, 40, 128, blocks=((128, 128),), densities=(0.25,)),
]
TINY = [Case("tiny", 192, 2, 64, (3, 8, 8), (1, 4, 8), ((32, 32),), (0.5,))]
PROMPT = "watermelon, fluent flat style"
SIZE = {"num_inference_steps": 10, "height": 256, "width": 256}
TINY_SIZE = {"num_inference_steps": 3, "height": 64, "width": 64, "max_sequence_length": 32}
SITES, STEPS = (0, 1, 4, 7), (0.2, 0.5, 0.9)  # of eight, and as shares of the run
RECIPE = {"recipe": "draft", "density": 0.25, "dense_steps": 0, "dense_layers": 0}


@dataclass(frozen=True)
class Row:
    """One timed kernel; `of_given` is how many times faster than ours as given on the same lists, `error` on noise."""

    case: str
    kernel: str
    density: float
    ms: float
    tflops: float
    of_cudnn: float
    of_given: float
    error: float


@dataclass(frozen=True)
class Real:
    """Relative output errors of one call of a model, as given (its dtype's own noise) and in int8."""

    model: str
    site: str
    step: int
    density: float
    given: float
    int8: float


# --- times, on noise ---


def time_case(case: Case, device: torch.device) -> Iterator[Row]:
    """Check and time one shape: dense, as given, int8, and on a GPU what int8 packs and the kernel for all GPUs."""
    dtype = torch.bfloat16
    q, k, v = (torch.randn(1, case.length, case.heads, case.dim, device=device, dtype=dtype) for _ in range(3))
    dense = math.nan
    if device.type == "cuda":
        for row in dense_rows(case, q, k, v):
            dense = row.tflops if "cudnn" in row.kernel else dense
            yield Row(case.name, row.kernel, 1.0, row.ms, row.tflops, row.of_cudnn, math.nan, math.nan)
    orders = ("raster",) if case.grid is None else ("raster", "tile, all full")
    for block, density, order in itertools.product(case.blocks, case.densities, orders):
        call = made_call(case, block, density, order, device)
        name, given = f"{block[0]}x{block[1]} {order}", math.nan
        for what, run, error in timed_runs(case, (q, k, v), call, f"{name} {density}"):
            ms = median_ms(run)
            given = ms if what == "given" else given
            pairs = computed_pairs(case, call["index"], block)
            tflops = 4 * pairs * case.dim / ms / 1e9
            share = pairs / (case.heads * case.length**2)
            yield Row(case.name, f"{what} {name}", share, ms, tflops, tflops / dense, given / ms, error)


def made_call(case: Case, block: tuple[int, int], density: float, order: str, device: torch.device) -> dict[str, Any]:
    """Random lists, in raster order or tile by tile."""
    index, count = random_lists(case, *block, density, device.type)
    call = {"index": index, "count": count, "full_count": count, "block_q": block[0], "block_k": block[1]}
    if order != "raster":
        assert case.grid is not None
        assert case.tile is not None
        call["q_order"] = call["k_order"] = tile_order(case.grid, case.tile, device.type)
    return call


Timed = tuple[str, Callable[[], Any], float]


def timed_runs(case: Case, qkv: tuple[Tensor, Tensor, Tensor], call: dict[str, Any], name: str) -> Iterator[Timed]:
    """What is timed on one set of lists, each checked first: its name, the call, its error against float64."""

    def given() -> tuple[Tensor, Tensor]:
        return block_sparse_attention(*qkv, **call)

    def rounded() -> tuple[Tensor, Tensor]:
        return block_sparse_attention(*qkv, **call, precision="int8")

    def wrong(what: str, error: float, worst: float) -> float:
        if not error <= worst:
            raise RuntimeError(f"{case.name} {what} {name} errs by {error:.2e}, more than {worst:.0e}: not timed")
        return error

    yield "given", given, wrong("given", sampled_error(*qkv, call, given), WORST_KERNEL)
    problem = problem_of(qkv, call)
    new, lost = quantised.rounded_problem(problem)

    def checked(what: str, run: Callable[[], tuple[Tensor, Tensor]]) -> float:
        def restored() -> tuple[Tensor, Tensor]:
            out, lse = run()
            return out, lse - lost

        wrong(f"{what} (rounded numbers)", sampled_error(new.q, new.k, new.v, call, restored), WORST_KERNEL)
        return wrong(what, sampled_error(*qkv, call, run, WORST_LSE), WORST_NOISE)

    error = checked("int8", rounded)
    yield "int8", rounded, error
    if not qkv[0].is_cuda:
        return
    from dit_accel.kernels.block_sparse.quantised_pack import pack
    from dit_accel.kernels.block_sparse.quantised_triton import attend

    yield "int8 packing alone", lambda: pack(problem), error

    def in_triton() -> tuple[Tensor, Tensor]:
        return attend(problem)

    yield "int8 in Triton", in_triton, checked("int8 in Triton", in_triton)


def problem_of(qkv: tuple[Tensor, Tensor, Tensor], call: dict[str, Any]) -> Any:
    orders = (call.get(name) for name in ("q_order", "k_order"))
    lists = (call["index"], call["count"], call["block_q"], call["block_k"], call["full_count"], *orders)
    return replace(_checked(*qkv, *lists, None, None, None), precision="int8")


# --- errors, on the calls of a demo model ---


@torch.no_grad()
def real_errors(device: torch.device, size: dict[str, Any]) -> Iterator[Real]:
    """Generate a picture with the demo model, and round the calls of some sites and steps."""
    from diffusers import FluxPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(dit_accel.demo_model("emoji-flux"), torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    found: list[Real] = []

    def watch(call: AttentionCall, plan: Plan, out: Tensor) -> None:
        steps = {int(share * size["num_inference_steps"]) for share in STEPS}
        if call.step.index in steps and call.site.index in SITES:
            found.append(measured(call, plan))

    with dit_accel.accelerate(pipe, **RECIPE) as handle:
        handle.watchers = (watch,)
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **size)
    yield from found


def measured(call: AttentionCall, plan: Plan) -> Real:
    """Hold one call, in bf16, against float64 on sampled queries of its plan."""
    q, k, v = (x.bfloat16() for x in (call.q, call.k, call.v))
    given = run_plan(plan, q, k, v, call.scale, call.key_bias)
    rounded = run_plan(replace(plan, precision="int8"), q, k, v, call.scale, call.key_bias)
    sampled = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(0))[:256].sort().values.to(q.device)
    missed, whole = torch.zeros(2, dtype=torch.float64), 0.0
    for head in range(q.shape[2]):
        logits = q[0, sampled, head].double() @ k[0, :, head].double().mT * call.scale
        seen = plan.rows(sampled, 0, head).to(logits.device)
        gold = torch.softmax(logits.masked_fill(~seen, -math.inf), -1) @ v[0, :, head].double()
        whole += float(gold.square().sum())
        missed += torch.stack([(x[0, sampled, head] - gold).square().sum().cpu() for x in (given, rounded)])
    errors = (missed / whole).sqrt().tolist()
    return Real("emoji-flux", call.site.name, call.step.index or 0, float(plan.density()), *errors)


def show(row: Row | Real) -> None:
    if isinstance(row, Real):
        print(
            f"{row.model} {row.site:32s} step {row.step:2d}, density {row.density:.3f}: error {row.int8:.1e} in int8, "
            f"{row.given:.1e} as given",
            flush=True,
        )
        return
    print(
        f"{row.case:22s} {row.kernel:36s} {row.density:6.3f} {row.ms:9.3f} ms {row.tflops:7.1f} TF "
        f"{row.of_cudnn:6.3f} of cuDNN {row.of_given:6.3f} x as given, error {row.error:.1e}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which shapes to time")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        sys.exit("this benchmark needs a CUDA device; --tiny runs the same path anywhere")
    torch.manual_seed(0)
    source = provenance(device, options.commit)
    kind = "quantised_tiny" if options.tiny else "quantised"
    path = options.out / f"{kind}_{'-'.join(source['gpu'].lower().split())}.json"
    real, rows = [], []
    for one in real_errors(device, TINY_SIZE if options.tiny else SIZE):
        real.append(one)
        show(one)
    for case in TINY if options.tiny else [case for case in CASES if case.name in options.cases]:
        for row in time_case(case, device):
            rows.append(row)
            show(row)
            write(path, source, real, rows)  # at once: a run that is cut off keeps what it measured
    print(f"written: {path}")


def write(path: Path, source: dict[str, str], real: list[Real], rows: list[Row]) -> None:
    """Write everything measured so far; what is not known is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{name: None if x != x else x for name, x in asdict(row).items()} for row in rows]
    half = path.with_suffix(".part")
    half.write_text(json.dumps({**source, "real": [asdict(x) for x in real], "rows": table}, indent=1) + "\n")
    half.replace(path)


if __name__ == "__main__":
    main()
