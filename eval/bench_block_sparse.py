"""Time the block-sparse attention kernel beside torch's dense attention, and check it first.

    python -m dit_accel.eval.bench_block_sparse [--out FOLDER] [--cases NAME...] [--commit HASH]

Every timed configuration is first held against an fp64 result on sampled rows, on the very inputs that are
timed and with poisoned output memory. Times are medians of `triton.testing.do_bench`; a TFLOP/s counts
computed pairs only (4 · pairs · head dim), so a ratio of 1 to dense means that skipping costs nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.eval.source import RESULTS, provenance
from dit_accel.kernels.block_sparse import block_sparse_attention, unsupported_reasons

WORST_ERROR = 1e-2  # of bf16 operands; a wrong mask or a race is far above
UNEVEN_MOST, UNEVEN_SIGMA = 4, 0.8  # the longest list in means, and the spread of their logarithms


@dataclass(frozen=True)
class Case:
    """A model's attention shape; `grid` and `tile` give the 3-D tile order that is timed beside raster."""

    name: str
    length: int
    heads: int
    dim: int
    grid: tuple[int, int, int] | None = None
    tile: tuple[int, int, int] | None = None
    blocks: tuple[tuple[int, int], ...] = ((128, 128), (128, 64), (64, 64))
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.10, 0.05)


CASES = [
    Case("video-32k-d128", 32768, 24, 128, (32, 32, 32), (4, 4, 8)),
    Case("wan-480p-ragged-d128", 32760, 12, 128, blocks=((128, 128),), densities=(0.25,)),
    Case("flux-1024-d128", 4608, 24, 128, (1, 64, 72), (1, 16, 8), densities=(1.0, 0.5, 0.25)),
    Case("video-32k-d64", 32768, 40, 64, (32, 32, 32), (4, 4, 8), densities=(0.25, 0.10)),
    Case("wan-720p-d128", 75648, 40, 128, blocks=((128, 128),), densities=(0.25, 0.10)),
]


ORDERS = ("raster", "raster, flash-attn-4", "raster, in Triton", "raster, uneven", "tile", "tile, all full")


@dataclass(frozen=True)
class Row:
    """One line of the table; `pairs` is the density that was really computed."""

    case: str
    kernel: str
    density: float
    ms: float
    tflops: float
    of_cudnn: float
    error: float


def tile_order(grid: tuple[int, int, int], tile: tuple[int, int, int], device: str) -> Tensor:
    """Slot -> token of the order that walks a raster grid tile by tile, int32 [1, 1, S]."""
    tokens = torch.arange(math.prod(grid), device=device, dtype=torch.int32).view(grid)
    for axis, size in enumerate(tile):
        tokens = tokens.unflatten(2 * axis, (-1, size))
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(1, 1, -1)


def random_lists(case: Case, block_q: int, block_k: int, density: float, device: str) -> tuple[Tensor, Tensor]:
    """As many random key blocks per query block and head as the density asks for."""
    q_blocks, k_blocks = -(-case.length // block_q), -(-case.length // block_k)
    kept = max(1, round(density * k_blocks))
    index = torch.rand(1, case.heads, q_blocks, k_blocks, device=device).argsort(-1)[..., :kept]
    count = torch.full((1, case.heads, q_blocks), kept, dtype=torch.int32, device=device)
    return index.sort(-1).values.int().contiguous(), count


def uneven_lists(case: Case, block_q: int, block_k: int, density: float, device: str) -> tuple[Tensor, Tensor]:
    """The same on average, with lengths as a cumulative threshold leaves them: log-normal."""
    k_blocks = -(-case.length // block_k)
    index, count = random_lists(case, block_q, block_k, min(1.0, UNEVEN_MOST * density), device)
    lengths = (torch.randn(count.shape, device=device) * UNEVEN_SIGMA).exp()
    lengths = (lengths / lengths.mean() * density * k_blocks).round().clamp(1, index.shape[3])
    return index, lengths.int()


def sampled_error(q: Tensor, k: Tensor, v: Tensor, call: dict, run: Callable, worst_lse: float = 1e-3) -> float:
    """Relative error ‖out - gold‖ / ‖gold‖ over random rows against fp64; NaN where none was written or lse is off."""
    poison = [torch.full_like(q, math.nan) for _ in range(2)]  # what the allocator hands out next
    del poison
    out, lse = run()
    if not (out.isfinite().all() and lse.isfinite().all()):
        return math.nan
    length, heads, dim = q.shape[1:]
    top = bottom = 0.0
    slots = -(-length // call["block_k"]) * call["block_k"]
    k_tokens = call.get("k_order", torch.arange(slots, device=q.device).view(1, 1, -1))[0, 0].long()
    k_tokens = k_tokens.view(-1, call["block_k"])
    q_slots = torch.arange(length, device=q.device)
    if "q_order" in call:
        q_slots[call["q_order"][0, 0].long()] = torch.arange(length, device=q.device)
    for token, head in zip(torch.randint(length, (48,)).tolist(), torch.randint(heads, (48,)).tolist(), strict=True):
        block = int(q_slots[token]) // call["block_q"]
        listed = call["index"][0, head, block, : int(call["count"][0, head, block])]
        keys = k_tokens[listed.long()].flatten()
        keys = keys[keys < length]
        logits = k[0, keys, head].double() @ q[0, token, head].double() * dim**-0.5
        gold = torch.softmax(logits, 0) @ v[0, keys, head].double()
        top += float((out[0, token, head] - gold).square().sum())
        bottom += float(gold.square().sum())
        if abs(float(lse[0, head, token] - torch.logsumexp(logits, 0))) > worst_lse:
            return math.nan
    return math.sqrt(top / bottom)


def median_ms(run: Callable) -> float:
    from triton.testing import do_bench

    return statistics.median(do_bench(run, warmup=25, rep=100, return_mode="all"))


def dense_rows(case: Case, q: Tensor, k: Tensor, v: Tensor) -> list[Row]:
    """cuDNN and flash attention of torch on the same inputs."""
    rows, q, k, v = [], q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    flop = 4 * case.length**2 * case.heads * case.dim
    best = math.nan
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            ms = median_ms(lambda: F.scaled_dot_product_attention(q, k, v))
        tflops = flop / ms / 1e9
        best = tflops if name == "cudnn" else best
        rows.append(Row(case.name, f"torch {name} dense", 1.0, ms, tflops, tflops / best, math.nan))
    return rows


def sparse_row(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    block: tuple[int, int],
    density: float,
    order: str,
    dense: float,
) -> Row:
    """Check one configuration, then time it; `order` is one of `ORDERS`."""
    q, k, v = qkv
    lists = uneven_lists if order == "raster, uneven" else random_lists
    index, count = lists(case, *block, density, q.device.type)
    call = {
        "index": index,
        "count": count,
        "block_q": block[0],
        "block_k": block[1],
        "full_count": count.clone(),
    }
    if not order.startswith("raster"):
        assert case.grid is not None
        assert case.tile is not None
        call["q_order"] = call["k_order"] = tile_order(case.grid, case.tile, q.device.type)
        call["full_count"] = count if order == "tile, all full" else call["full_count"]

    def run() -> tuple[Tensor, Tensor]:
        if order == "raster, in Triton":
            return in_triton(q, k, v, call)
        if order == "raster, flash-attn-4":
            return block_sparse_attention(q, k, v, backend="fa4", **{**call, "full_count": count})
        return block_sparse_attention(q, k, v, backend="triton", **call)

    error = sampled_error(q, k, v, call, run)
    if not error < WORST_ERROR:
        raise RuntimeError(f"{case.name} {block} density {density} {order}: relative error {error}")
    ms = median_ms(run)
    pairs = computed_pairs(case, index, block, count)
    tflops = 4 * pairs * case.dim / ms / 1e9
    name = f"ours {block[0]}x{block[1]} {order}"
    if order == "raster, flash-attn-4":
        name = f"flash-attn-4 {block[0]}x{block[1]}"
    return Row(case.name, name, pairs / (case.heads * case.length**2), ms, tflops, tflops / dense, error)


def has_flash_attn_4(case: Case, block: tuple[int, int]) -> bool:
    """Whether flash-attn-4 is installed and takes such a call."""
    device = torch.device("cuda")
    missing = unsupported_reasons("fa4", device=device, dtype=torch.bfloat16, head_dim=case.dim)
    return not missing and block == (128, 128) and case.length % 128 == 0


def in_triton(q: Tensor, k: Tensor, v: Tensor, call: dict) -> tuple[Tensor, Tensor]:
    """The call by the kernel for all GPUs, also where one of its own is taken."""
    from dit_accel.kernels.block_sparse.api import _checked
    from dit_accel.kernels.block_sparse.triton import attend

    lists = (call["index"], call["count"], call["block_q"], call["block_k"], call["full_count"])
    return attend(_checked(q, k, v, *lists, None, None, None, None, None))


def computed_pairs(case: Case, index: Tensor, block: tuple[int, int], count: Tensor | None = None) -> int:
    """Token pairs in the lists, without the padding of ragged blocks; without a count all of `index` is used."""
    block_q, block_k = block
    blocks = torch.arange(index.shape[2], device=index.device)
    rows = (case.length - blocks * block_q).clamp(max=block_q)
    cols = (case.length - index.long() * block_k).clamp(max=block_k)
    if count is not None:
        cols = cols * (torch.arange(index.shape[3], device=index.device) < count[..., None])
    return int((cols.sum(-1) * rows).sum())


def run_case(case: Case) -> list[Row]:
    q, k, v = (torch.randn(1, case.length, case.heads, case.dim, device="cuda").bfloat16() for _ in range(3))
    rows = dense_rows(case, q, k, v)
    show(rows)
    orders = ["raster"] if case.grid is None else list(ORDERS)
    for block in case.blocks:
        for density, order in itertools.product(case.densities, orders):
            if order == "raster, flash-attn-4" and not has_flash_attn_4(case, block):
                continue
            if order in ORDERS[:2] or density in (0.25, 0.10):
                rows.append(sparse_row(case, (q, k, v), block, density, order, rows[0].tflops))
                show(rows[-1:])
    return rows


def show(rows: list[Row]) -> None:
    for r in rows:
        print(
            f"{r.case:22s} {r.kernel:32s} {r.density:6.3f} {r.ms:9.3f} ms {r.tflops:7.1f} TF "
            f"{r.of_cudnn:6.3f} of cuDNN  error {r.error:.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--cases", nargs="*", default=[c.name for c in CASES], help="names of the shapes to run")
    parser.add_argument("--commit", default="", help="what to write where the checkout is no git repository")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    source = provenance(torch.device("cuda"), options.commit)
    name = "-".join(source["gpu"].lower().split())
    path = options.out / f"block_sparse_{name}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for case in CASES:
        if case.name in options.cases:
            rows += run_case(case)
            table = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
            path.write_text(json.dumps({**source, "rows": table}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
