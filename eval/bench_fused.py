"""Check and time means of units, k-means, errors of means, norms in one pass, and a plan's special branches.

    python -m dit_accel.eval.bench_fused [--out FOLDER] [--cases NAME...] [--only KIND...] [--tiny]
        [--commit HASH]

Every operation is first held against float64 on sampled rows of the very inputs that are timed; a wrong one is not
timed. Times are medians of `triton.testing.do_bench` (with --tiny, on a CPU, of the clock). Beside each stands its
bound, the least time that its bytes or its FLOPs allow, from the data sheet of an H100 SXM: 3.35 TB/s and 989 TFLOP/s
(bf16, dense).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dit_accel.eval import ada_norm_rows, branch_rows, error_rows, norm_rope_rows
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.kernels.choice import Backend
from dit_accel.kernels.kmeans import kmeans
from dit_accel.kernels.unit_means import unit_means
from dit_accel.kernels.unit_means.api import unsupported_reasons

KINDS = ("means", "errors", "norm-rope", "ada-norm", "branches")
BYTES_PER_MS, FLOPS_PER_MS = 3.35e9, 989e9
WORST_MEAN = 1e-5  # relative to the largest mean, of sums in fp32
WORST_EXCESS = 1e-2  # relative to the mean distance, of centroids rounded to bf16


@dataclass(frozen=True)
class Case:
    """A model's tokens, heads and head dim; `unit` slots a unit; clusters as Sparse VideoGen 2 has them."""

    name: str
    length: int
    heads: int
    dim: int
    unit: int = 128
    clusters: tuple[int, ...] = (300, 1000)


CASES = [Case("wan-14b-720p-81", 75_648, 40, 128), Case("flux-1024", 4_608, 24, 128, clusters=(100, 250))]
TINY = [Case("tiny-wan", 333, 2, 64, 48, (7,)), Case("tiny-flux", 130, 3, 40, 16, (5,))]


@dataclass(frozen=True)
class Row:
    """One line: `bound_ms` is the larger of the bytes' and the FLOPs' least time, `error` that of the check."""

    case: str
    operation: str
    ms: float
    bound_ms: float
    bound_by: str
    error: float


def row(
    case: Case | error_rows.Case | norm_rope_rows.Case | ada_norm_rows.Case | branch_rows.Case,
    operation: str,
    run: Callable[[], Any],
    error: float,
    moved: float,
    flops: float = 0.0,
) -> Row:
    """Time a checked operation that must move so many bytes and do so many FLOPs."""
    least = {"bytes": moved / BYTES_PER_MS, "FLOPs": flops / FLOPS_PER_MS}
    by = max(least, key=lambda name: least[name])
    return Row(case.name, operation, median_ms(run), least[by], by, error)


def median_ms(run: Callable[[], Any]) -> float:
    """Median time of one call in ms."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        middle = do_bench(run, warmup=50, rep=300, return_mode="median")
        return cast(float, middle)  # a list only where quantiles are asked for
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def require(what: str, error: float, worst: float) -> float:
    """Return the error unless it is too large or NaN."""
    if not error <= worst:
        raise RuntimeError(f"{what} errs by {error:.2e}, more than {worst:.0e}: not timed")
    return error


def means_error(x: Tensor, slots: Tensor, unit: int, got: Tensor) -> float:
    """Largest error of sampled units against float64, relative to the largest mean."""
    worst, largest = 0.0, 0.0
    for u in torch.randint(got.shape[2], (24,)).tolist():
        tokens = slots[0, 0, u * unit : (u + 1) * unit].long()
        gold = x[:, tokens[tokens >= 0]].double().mean(1)
        worst = max(worst, float((got[:, :, u] - gold).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(gold.abs().max()))
    return worst / largest


def excess(x: Tensor, start: Tensor, labels: Tensor) -> float:
    """How much farther than the nearest centroid a sampled token's own is, relative to the mean distance."""
    at = torch.randint(x.shape[2], (256,), device=x.device)
    distance = torch.cdist(x[:, :, at].double(), start.double())
    own = distance.gather(-1, labels[:, :, at].long()[..., None])[..., 0]
    nearest = distance.amin(-1)
    return float((own - nearest).max() / nearest.mean())


def moved_error(x: Tensor, labels: Tensor, centroids: Tensor, sizes: Tensor) -> float:
    """Largest error of the mean of sampled clusters with tokens against float64, relative to the largest mean."""
    if not torch.equal(sizes.sum(-1), torch.full_like(sizes[..., 0], x.shape[2])):
        return float("nan")
    worst, largest = 0.0, 0.0
    for head in range(x.shape[1]):
        cluster = int(labels[0, head, int(torch.randint(x.shape[2], (1,)))])
        gold = x[0, head, labels[0, head] == cluster].double().mean(0)
        worst = max(worst, float((centroids[0, head, cluster] - gold).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(gold.abs().max()))
    return worst / largest


def means_rows(case: Case, x: Tensor, backends: Sequence[Backend]) -> Iterator[Row]:
    """Means of one of q and k through an order with a ragged end."""
    holes = -case.length % case.unit
    order = torch.randperm(case.length, device=x.device).int()
    slots = torch.nn.functional.pad(order, (0, holes), value=-1)[None, None]
    out = x.shape[2] * (len(slots[0, 0]) // case.unit) * case.dim * 4
    for backend in backends:

        def run(backend: Backend = backend) -> Tensor:
            return unit_means(x, slots, case.unit, backend=backend)

        error = require(f"{case.name} means {backend}", means_error(x, slots, case.unit, run()), WORST_MEAN)
        yield row(case, f"means {backend}", run, error, x.numel() * x.element_size() + slots.numel() * 4 + out)


def kmeans_rows(case: Case, x: Tensor, backends: Sequence[Backend]) -> Iterator[Row]:
    """One warm iteration, its assignment alone, and the rest of it; tokens are noise, as hard as it gets."""
    heads_first = x.transpose(1, 2)
    each = x.numel() * x.element_size()
    for clusters, backend in itertools.product(case.clusters, backends):
        _, start, _ = kmeans(heads_first, clusters, 1, backend=backend)

        def run(backend: Backend = backend, start: Tensor = start) -> tuple[Tensor, Tensor, Tensor]:
            return kmeans(heads_first, start.shape[2], 1, start, backend=backend)

        labels, centroids, sizes = run()
        name = f"k-means {clusters} {backend}"
        apart = require(f"{case.name} {name} labels", excess(heads_first, start, labels), WORST_EXCESS)
        require(f"{case.name} {name} centroids", moved_error(heads_first, labels, centroids, sizes), WORST_MEAN)
        if not all(torch.equal(a, b) for a, b in zip(run(), (labels, centroids, sizes), strict=True)):
            raise RuntimeError(f"{case.name} {name}: two runs differ: not timed")
        flops = 2.0 * x.shape[0] * case.heads * case.length * clusters * case.dim
        yield row(case, name, run, apart, 2 * each, flops)
        if backend == "triton":
            yield from parts(case, heads_first, start, labels, apart, flops)


def parts(case: Case, x: Tensor, start: Tensor, labels: Tensor, error: float, flops: float) -> Iterator[Row]:
    """The two halves of an iteration, and the assignment with other tiles (each held against the first's labels)."""
    from dit_accel.kernels.kmeans.triton import Tile, assign, choose, update

    each, clusters = x.numel() * x.element_size(), start.shape[2]
    yield row(case, f"update {clusters}", lambda: update(x, labels, start), error, each)
    if not x.is_cuda:
        return
    others = (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 4))
    for tile in (choose(case.dim, x.element_size()), *others):
        name = f"assign {clusters} {tile.tokens}x{tile.clusters} w{tile.warps} s{tile.stages}"
        apart = require(f"{case.name} {name}", excess(x, start, assign(x, start, tile)), WORST_EXCESS)
        yield row(case, name, lambda tile=tile: assign(x, start, tile), apart, each, flops)


@torch.no_grad()
def run_case(case: Case, device: torch.device) -> Iterator[Row]:
    """Check and time the operations on one model's shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    can = not unsupported_reasons("triton", torch.empty(1, 1, 1, 16, device=device, dtype=dtype))
    backends: tuple[Backend, ...] = ("triton", "reference") if can else ("reference",)
    x = torch.randn(1, case.length, case.heads, case.dim, device=device, dtype=dtype) + 0.5
    yield from means_rows(case, x, backends)
    yield from kmeans_rows(case, x, backends)


@torch.no_grad()
def run_errors(case: error_rows.Case, device: torch.device) -> Iterator[Row]:
    """What it costs the output to let means stand for a unit, by which presets choose."""
    for timed in error_rows.error_rows(case, device):
        yield row(case, timed.name, timed.run, timed.error, timed.moved, timed.flops)


@torch.no_grad()
def run_norm_rope(case: norm_rope_rows.Case, device: torch.device) -> Iterator[Row]:
    """Norm and rotation of queries and keys: stock's modules one after the other, and in one pass."""
    for timed in norm_rope_rows.norm_rope_rows(case, device):
        yield row(case, timed.name, timed.run, timed.error, timed.moved)


@torch.no_grad()
def run_ada_norm(case: ada_norm_rows.Case, device: torch.device) -> Iterator[Row]:
    """Layer norm, scale and shift: stock's operations one after the other, and in one pass."""
    for timed in ada_norm_rows.ada_norm_rows(case, device):
        yield row(case, timed.name, timed.run, timed.error, timed.moved)


@torch.no_grad()
def run_branches(case: branch_rows.Case, device: torch.device) -> Iterator[Row]:
    """Branches over columns, text and centroids."""
    for timed in branch_rows.branch_rows(case, device):
        yield row(case, timed.name, timed.run, timed.error, timed.moved, timed.flops)


def kept_rows(path: Path, source: dict[str, str]) -> list[Row]:
    """Return the rows of an earlier file that was made from the same commit, device and versions."""
    try:
        old = json.loads(path.read_text())
        same = all(old[key] == source[key] for key in source if key != "date")
        return [Row(**row) for row in old["rows"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write(path: Path, source: dict[str, str], rows: Sequence[Row]) -> None:
    """Write everything measured so far, by way of a second file so that a half-written one is never left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps({**source, "rows": [asdict(one) for one in rows]}, indent=1) + "\n")
    half.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    full = (CASES, error_rows.CASES, norm_rope_rows.CASES, ada_norm_rows.CASES, branch_rows.CASES)
    tiny = (TINY, error_rows.TINY, norm_rope_rows.TINY, ada_norm_rows.TINY, branch_rows.TINY)
    names = sorted({case.name for cases in full for case in cases})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="which models to time")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="which operations to time")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any device")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        sys.exit("this benchmark needs a CUDA device; --tiny runs the same path anywhere")
    torch.manual_seed(0)
    source = provenance(device, options.commit)
    kind = "fused_tiny" if options.tiny else "fused"
    path = options.out / f"{kind}_{'-'.join(source['gpu'].lower().split())}.json"
    means, errors, turned, modulated, branches = tiny if options.tiny else full
    kinds = {
        "means": [(run_case, case) for case in means],
        "errors": [(run_errors, case) for case in errors],
        "norm-rope": [(run_norm_rope, case) for case in turned],
        "ada-norm": [(run_ada_norm, case) for case in modulated],
        "branches": [(run_branches, case) for case in branches],
    }
    asked = [one for kind in options.only for one in kinds[kind]]
    rows = kept_rows(path, source)
    for one in itertools.chain.from_iterable(
        run(case, device) for run, case in asked if options.tiny or case.name in options.cases
    ):
        rows = [old for old in rows if (old.case, old.operation) != (one.case, one.operation)] + [one]
        write(path, source, rows)
        print(
            f"{one.case:16} {one.operation:28} {one.ms:9.3f} ms, "
            f"{one.bound_by} allow {one.bound_ms:.3f} ms, error {one.error:.1e}",
            flush=True,
        )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
