"""Check and time GRAT's attention beside dense attention, on Flux's pictures as they grow.

    python -m dit_accel.eval.bench_grat [--sides PIXELS...] [--recipes NAME...] [--out FOLDER] [--commit HASH] [--tiny]

GRAT (Ren et al. 2025, arXiv 2505.14687) decides by place alone, so its density falls as the picture grows. Each
plan is first held against float64 on sampled queries; a wrong one is not timed. Both sides are medians of
`triton.testing.do_bench` in the same run; dense is torch's attention, by cuDNN where it takes the call. The sparse time
is the whole call as an accelerated model makes it: gathering, both branches, the text's rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

from dit_accel.eval.bench_crossover import timed_ms
from dit_accel.eval.bench_decide import WORST_ERROR
from dit_accel.eval.decide_calls import Calls, Case, always_sparse, sampled_error, shrunk
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.layout import TokenLayout

PIXELS = 16  # of a token's side, in Flux
TEXT, HEADS, DIM = 512, 24, 128
REPEATS = 5


def measure(side: int, name: str, device: torch.device, tiny: bool = False) -> dict[str, Any]:
    """Return one row: density, error, and the times of a dense and of a sparse call in ms."""
    tokens = side // PIXELS
    layout = TokenLayout(grid=(1, tokens, tokens), text=7 if tiny else TEXT, text_first=True)
    case = Case(f"flux-{side}", layout, 2 if tiny else HEADS, 32 if tiny else DIM)
    recipe = shrunk(name) if tiny else always_sparse(name)
    calls = Calls(recipe, case, device, torch.float32 if tiny else torch.bfloat16)
    error = sampled_error(calls)
    if not error < WORST_ERROR:
        raise RuntimeError(f"{name} at {side} px: relative error {error}")
    call = calls.prepared("kept")
    density = calls.engine.planner.plan(call).density()
    q, k, v = (x.transpose(1, 2) for x in calls.qkv)
    dense = timed_ms(lambda: F.scaled_dot_product_attention(q, k, v), device, REPEATS)
    sparse = timed_ms(lambda: calls.attend(call), device, REPEATS)
    return {
        "recipe": name,
        "pixels": side,
        "tokens": layout.length,
        "density": round(float(density), 6),
        "error": error,
        "dense_ms": round(dense, 3),
        "sparse_ms": round(sparse, 3),
        "gain": round(dense / sparse, 2),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as one table."""
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=160).print(table)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[2048, 4096, 8192], help="pixels of a picture's side")
    parser.add_argument("--recipes", nargs="+", default=["grat-b", "grat-x"], help="recipes that decide by place")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    parser.add_argument("--tiny", action="store_true", help="a tiny call, on any device, not written")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("this benchmark needs a CUDA device; --tiny walks the same path without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = []
    for side in [256] if options.tiny else options.sides:
        for name in options.recipes:
            rows.append(measure(side, name, device, options.tiny))
            show(rows[-1:])
    show(rows)
    if not options.tiny:
        source = provenance(device, options.commit)
        path = options.out / f"grat_{'-'.join(source['gpu'].lower().split())}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**source, "rows": rows}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
