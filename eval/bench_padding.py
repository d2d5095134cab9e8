"""Count what clusters waste in blocks: the share of computed pairs of slots that hold no pair of tokens.

    python -m dit_accel.eval.bench_padding [--no-model] [--clusters Q K] [--seed N]
    python -m dit_accel.eval.bench_padding --time [--out FOLDER] [--commit HASH]

A cluster takes whole blocks of its own, so the last one of each is padded on both sides. This is arithmetic and runs
anywhere: sizes of 300 query and 1000 key clusters of 75,600 tokens, drawn more and more unequal, and those that k-means
finds among the queries and keys of the demo model emoji-wan, at as many tokens a cluster and with the pairs that svg2
(Yang et al. 2025, arXiv 2505.18875) picks there. Every number is checked against the plan that the engine would run.
`--time` attends drawn clusters on a GPU, 40 heads of 128 channels, in each of the blocks that the kernels take: what
counts is the time, not the waste. Each is first held against float64 on sampled queries.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dit_accel
from dit_accel.attend import run
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.eval.bench_crossover import timed_ms
from dit_accel.eval.bench_decide import WORST_ERROR
from dit_accel.eval.source import RESULTS, provenance
from dit_accel.sparsity.cut import Cut, from_sorted
from dit_accel.sparsity.decide import decide
from dit_accel.sparsity.inputs import Inputs
from dit_accel.sparsity.plan import Plan, from_units
from dit_accel.sparsity.recipes import resolve

TOKENS, CLUSTERS = 75_600, (300, 1000)
DENSITY = 0.2
SPREADS = (0.0, 0.5, 1.0)  # of the logarithm of a cluster's size
BLOCKS = (
    (128, 128),
    (128, 32),
    (128, 16),
    (64, 64),
    (64, 32),
    (64, 16),
    (32, 16),
    (16, 16),
    (64, 1),
)  # 1: keys listed one by one
TIMED, HEADS, DIM = ((128, 128), (128, 64), (128, 32), (128, 16), (64, 64), (64, 32), (64, 16)), 40, 128
PROMPT, STEPS, SITES = "taco sliding left, noto style", (1, 3), (1, 4)
SIZE = {"height": 384, "width": 512, "num_frames": 33, "num_inference_steps": 4, "guidance_scale": 1.0}


@dataclass(frozen=True)
class Clusters:
    """Sizes of query and key clusters, int64 [heads, clusters], and which pairs are computed, bool [heads, q, k]."""

    name: str
    q: Tensor
    k: Tensor
    mask: Tensor

    def waste(self, block_q: int, block_k: int) -> float:
        """Return the share of computed pairs that is padding, in blocks of these sizes."""
        q, k = (-(-sizes // block) * block for sizes, block in ((self.q, block_q), (self.k, block_k)))
        return 1 - float(self._pairs(self.q, self.k) / self._pairs(q, k))

    def _pairs(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.mask * q[..., None].double() * k[..., None, :].double()).sum()


def drawn(spread: float, rng: torch.Generator, counts: Sequence[int] = CLUSTERS) -> Clusters:
    """Draw sizes whose logarithms spread so much, and as many random pairs of clusters as the density asks for."""
    sizes = []
    for clusters in counts:
        weights = (torch.randn(clusters, generator=rng, dtype=torch.float64) * spread).exp()
        edges = (weights.cumsum(0) / weights.sum() * TOKENS).round().long()
        sizes.append(edges.diff(prepend=torch.zeros(1, dtype=torch.int64)))
    mask = torch.rand(1, *counts, generator=rng) < DENSITY
    return Clusters(f"drawn, spread {spread:.1f}", sizes[0][None], sizes[1][None], mask)


def plan_of(found: Clusters, block_q: int, block_k: int) -> Plan:
    """Return the plan that the engine makes of clusters, on tokens in any order."""
    tokens, text = int(found.q[0].sum()), torch.empty(0, dtype=torch.int32, device=found.q.device)
    order = torch.arange(tokens, dtype=torch.int32, device=found.q.device).expand(1, len(found.q), -1)
    sides = (from_sorted(order, n[None], block, text) for n, block in ((found.q, block_q), (found.k, block_k)))
    return from_units(found.mask[None], Cut(tokens, *sides))


def plan_waste(plan: Plan) -> float:
    """Return the share of computed pairs of slots that a plan of one branch wastes."""
    (branch,) = plan.branches
    assert plan.pairs is not None
    assert branch.q_order is not None
    rows = branch.count * (branch.q_order.unflatten(-1, (-1, branch.block_q)) >= 0).any(-1)
    return 1 - float(plan.pairs.sum() / (rows.sum().double() * branch.block_q * branch.block_k))


@torch.no_grad()
def of_demo_model(name: str = "emoji-wan") -> Iterator[Clusters]:
    """Cluster some calls of the demo model, with as many tokens a cluster as a large model has, as svg2 decides."""
    from diffusers import WanPipeline

    pipe: Any = WanPipeline.from_pretrained(dit_accel.demo_model(name))
    pipe.set_progress_bar_config(disable=True)
    found: list[Clusters] = []

    def watch(call: AttentionCall, plan: Plan, out: Tensor) -> None:
        if call.step.index in STEPS and call.site.index in SITES:
            found.append(of_call(call, f"{name} {call.site.name}, step {call.step.index}"))

    with dit_accel.accelerate(pipe, "draft", density=0.5, dense_steps=0, dense_layers=0) as handle:
        handle.watchers = (watch,)
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **SIZE)
    yield from found


def of_call(call: AttentionCall, name: str) -> Clusters:
    """Return the clusters of one call and what svg2 picks among them (first sample)."""
    tokens = call.layout.length - call.layout.text
    queries, keys = (max(1, round(n * tokens / TOKENS)) for n in CLUSTERS)
    recipe: Recipe = resolve("svg2").override(order={"kind": "kmeans", "queries": queries, "keys": keys})
    made = decide(recipe, Inputs(call.layout, call.q, call.k, call.v, call.scale, call.key_bias))
    sides = (side.on_grid(side.weights, -1)[0].long() for side in (made.cut.q, made.cut.k))
    mask = made.mask[0][:, made.cut.q.grid][:, :, made.cut.k.grid]
    return Clusters(name, *sides, mask)


def table(found: Sequence[Clusters]) -> Table:
    """Lay out the waste by blocks, with the sizes it comes from."""
    shown = Table(title="padding, share of computed pairs", caption="64 x 1: keys listed one by one, not in blocks")
    for name in ("clusters", "tokens of a q, k cluster", *(f"{q} x {k}" for q, k in BLOCKS)):
        shown.add_column(name, justify="left" if name == "clusters" else "right", no_wrap=True)
    for one in found:
        sizes = ", ".join(f"{x.double().mean():.0f} ± {x.double().std():.0f}" for x in (one.q, one.k))
        shown.add_row(one.name, sizes, *(f"{one.waste(*blocks):.1%}" for blocks in BLOCKS))
    return shown


def checked(found: Clusters) -> Clusters:
    """Return clusters whose count equals that of the engine's plan; RuntimeError where it doesn't."""
    counted, planned = found.waste(64, 64), plan_waste(plan_of(found, 64, 64))
    if abs(counted - planned) > 1e-9:
        raise RuntimeError(f"{found.name}: {counted} was counted, but the engine's plan wastes {planned}")
    return found


def timings(found: Clusters, device: torch.device) -> Iterator[dict[str, Any]]:
    """Check and time the attention of clusters in each of the blocks; TFLOP/s count pairs of tokens alone."""
    shape = (1, TOKENS, HEADS, DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    many = Clusters(found.name, *(x.expand(HEADS, *x.shape[1:]).to(device) for x in (found.q, found.k, found.mask)))
    for blocks in TIMED:
        plan = plan_of(many, *blocks)
        error = sampled_error(plan, q, k, v)
        if not error < WORST_ERROR:
            raise RuntimeError(f"{found.name} in blocks of {blocks}: relative error {error}")
        assert plan.pairs is not None
        ms = timed_ms(lambda plan=plan: run(plan, q, k, v), device, 5)
        pairs = float(plan.pairs.sum()) * (HEADS if plan.pairs.numel() == 1 else 1)
        yield {
            "clusters": found.name,
            "blocks": f"{blocks[0]} x {blocks[1]}",
            "waste": round(many.waste(*blocks), 4),
            "ms": round(ms, 3),
            "useful_tflops": round(4 * pairs * DIM / ms / 1e9, 1),
            "error": error,
        }
        del plan


def sampled_error(plan: Plan, q: Tensor, k: Tensor, v: Tensor, rows: int = 24) -> float:
    """Return ‖out - gold‖ / ‖gold‖ over random queries of two heads against float64, NaN where out is not finite."""
    out = run(plan, q, k, v)
    if not out.isfinite().all():
        return math.nan
    top = bottom = 0.0
    for head in torch.randperm(q.shape[2])[:2].tolist():
        tokens = torch.randint(q.shape[1], (rows,)).to(q.device)
        logits = q[0, tokens, head].double() @ k[0, :, head].double().T * q.shape[3] ** -0.5
        weights = logits.masked_fill(~plan.rows(tokens, head=head), -math.inf).softmax(-1)
        gold = weights @ v[0, :, head].double()
        top += float((out[0, tokens, head] - gold).square().sum())
        bottom += float(gold.square().sum())
    return math.sqrt(top / bottom)


@torch.inference_mode()
def time_all(found: Sequence[Clusters], out: Path, commit: str) -> None:
    """Time drawn clusters on the GPU, print each row, and write all."""
    device, rows = torch.device("cuda"), []
    for one in found:
        for row in timings(one, device):
            rows.append(row)
            print(*row.values(), flush=True)
    source = provenance(device, commit)
    path = out / f"padding_{'-'.join(source['gpu'].lower().split())}.json"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**source, "rows": rows}, indent=1) + "\n")
    print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-model", action="store_true", help="drawn sizes alone")
    parser.add_argument("--clusters", nargs=2, type=int, default=CLUSTERS, help="how many of the drawn ones")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn sizes")
    parser.add_argument("--time", action="store_true", help="time drawn clusters on a GPU instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON, with --time")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    options = parser.parse_args(argv)
    if options.time and not torch.cuda.is_available():
        sys.exit("--time needs a CUDA device")
    rng = torch.Generator().manual_seed(options.seed)
    found = [checked(drawn(spread, rng, options.clusters)) for spread in SPREADS]
    if options.time:
        time_all(found, options.out, options.commit)
        return
    if not options.no_model:
        found += [checked(one) for one in of_demo_model()]
    Console(width=160).print(table(found))


if __name__ == "__main__":
    main()
