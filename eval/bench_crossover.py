"""Measure from which length on a planned sparse attention call beats dense, and write the presets' table.

    python -m dit_accel.eval.bench_crossover [--out dit_accel/sparsity/crossover.json] [--recipe NAME] [--quick]
        [--commit HASH]

Dense is torch's scaled_dot_product_attention with its default backend. Sparse is the mean over the steps for which the
recipe keeps a decision (`every`): decision, index lists, kernel and correction, with the presets' own axes or another
recipe's (then name another `--out`). Rows of other device types already in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dit_accel.eval.decide_calls import Calls, Case, always_sparse
from dit_accel.eval.source import provenance
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.crossover import TABLE

DENSITIES = (0.1, 0.2, 0.3, 0.5)
SIDES = {"cpu": (16, 24, 32, 48, 64, 96), "cuda": (32, 48, 64, 96, 128, 192, 256)}
SHAPES = {"cpu": (6, 64, torch.float32), "cuda": (24, 128, torch.bfloat16)}


def timed_ms(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of a call in milliseconds, after two warm-up calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=20, rep=20 * repeats, return_mode="median"))
    call()
    spans = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spans.append((time.perf_counter() - start) * 1e3)
    return statistics.median(spans)


def measure(name: str, side: int, density: float, device: torch.device, repeats: int) -> dict[str, float]:
    """Time an attention call over a picture of side x side tokens, dense, and sparse over a decision's life."""
    case = Case("picture", TokenLayout(grid=(1, side, side)), *SHAPES[device.type][:2])
    recipe = always_sparse(name).override(density=density)
    calls = Calls(recipe, case, device, SHAPES[device.type][2])
    q, k, v = (x.transpose(1, 2) for x in calls.qkv)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def sparse() -> None:
        calls.attend(calls.prepared("first"))
        for step in range(1, recipe.every):
            calls.attend(calls.call(step))

    return {
        "tokens": case.layout.length,
        "density": density,
        "dense_ms": round(timed_ms(dense, device, repeats), 4),
        "sparse_ms": round(timed_ms(sparse, device, repeats) / recipe.every, 4),
    }


def write(path: Path, device: torch.device, commit: str, rows: list[dict[str, float]]) -> None:
    """Put this device type's rows into the table, keeping the others."""
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}, "measured_on": {}}
    data["rows"][device.type] = rows
    data["measured_on"][device.type] = provenance(device, commit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--recipe", default="balanced", help="whose axes are timed")
    parser.add_argument("--quick", action="store_true", help="two sizes, for a look")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides = SIDES[device.type][:2] if options.quick else SIDES[device.type]
    jobs = [(side, density) for side in sides for density in DENSITIES]
    rows = [measure(options.recipe, side, density, device, 7) for side, density in track(jobs, "measuring")]
    table = Table("tokens", "density", "dense ms", "sparse ms", "dense / sparse")
    for row in rows:
        gain = row["dense_ms"] / row["sparse_ms"]
        table.add_row(*(str(row[key]) for key in row), f"{gain:.2f}")
    Console().print(table)
    write(options.out, device, options.commit, rows)


if __name__ == "__main__":
    main()
