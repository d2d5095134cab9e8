"""What `bench_fused` times of a plan's special branches: columns, text shared by all, centroids; checked, and counted.

*Columns*: a twentieth of the key blocks, the same for all queries. *Text keys*: what all queries see of the prompt,
also with two samples that share it. *Text queries*: what the prompt sees, which is everything. *Centroids*: SVG-EAR's
mean keys and values of skipped clusters, with the logarithm of their tokens on the logit (`kernels/pooled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_accel.eval.norm_rope_rows import Timed
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.pooled import pooled_attention
from dit_accel.kernels.pooled.api import Backend, unsupported_reasons

BLOCK = 128
COLUMNS = 0.05  # of the key blocks
SKIPPED = 0.8  # of the clusters, each standing for its tokens
BACKENDS: tuple[Backend, ...] = ("triton", "reference")
SAMPLED = 32  # queries a head that are held against float64
WORST = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
Attend = Callable[[], tuple[Tensor, Tensor]]
Gold = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # head and queries -> their logits and the values, float64


@dataclass(frozen=True)
class Case:
    """A model's attention: `picture` tokens, `text` in the same sequence, and clusters of queries and of keys."""

    name: str
    picture: int
    text: int
    heads: int
    dim: int = 128
    clusters: tuple[int, int] = (300, 1000)


CASES = [
    Case("wan-14b-720p-81", 75_600, 0, 40),
    Case("hunyuan-720p-129", 118_800, 256, 24),
    Case("flux-4096", 65_536, 512, 24),
]
TINY = [Case("tiny-video", 300, 0, 2, 16, (3, 9)), Case("tiny-joint", 140, 150, 1, 16, (4, 7))]


class Call:
    """One model's queries, keys and values on noise, text last."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device = case, device
        self.length = case.picture + case.text
        shape = (1, self.length, case.heads, case.dim)
        self.q, self.k, self.v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        self.scale = case.dim**-0.5

    def timed(self, name: str, run: Attend, gold: Gold, **counted: float) -> Timed:
        """Check a branch on sampled queries of every head; RuntimeError where it is wrong."""
        out, lse = run()
        missed = whole = 0.0
        for head in range(self.case.heads):
            rows = torch.randint(out.shape[1], (SAMPLED,), device=self.device)
            logits, values = gold(head, rows)
            right = logits.softmax(-1) @ values
            missed += float((out[-1, rows, head] - right).square().sum())
            whole += float(right.square().sum())
            off = float((lse[-1, head, rows] - logits.logsumexp(-1)).abs().max())
            missed = missed if off < 1e-3 else math.nan
        error = math.sqrt(missed / whole)
        if not error <= WORST[self.q.dtype]:
            raise RuntimeError(f"{self.case.name} {name} errs by {error:.2e}: not timed")
        return Timed(name, run, error, **counted)

    def blocks(self, name: str, q: Tensor, k: Tensor, v: Tensor, listed: Tensor) -> Timed:
        """Time attention of all of q to the same key blocks, int64 [blocks]."""
        batch, length, heads, dim = q.shape
        rows = -(-length // BLOCK)
        index = listed.int().expand(1, 1, rows, -1).contiguous()
        count = torch.full((1, 1, rows), len(listed), dtype=torch.int32, device=self.device)
        lists = {"block_q": BLOCK, "block_k": BLOCK, "full_count": count}
        keys = (listed[:, None] * BLOCK + torch.arange(BLOCK, device=self.device)).flatten()
        keys = keys[keys < k.shape[1]]

        def gold(head: int, at: Tensor) -> tuple[Tensor, Tensor]:
            logits = q[-1, at, head].double() @ k[-1, keys, head].double().mT * self.scale
            return logits, v[-1, keys, head].double()

        size = q.element_size()
        moved = 2.0 * q.numel() * size + 2 * len(keys) * heads * dim * size + batch * heads * length * 4
        flops = 4.0 * batch * heads * length * len(keys) * dim
        return self.timed(
            name, partial(block_sparse_attention, q, k, v, index, count, **lists), gold, moved=moved, flops=flops
        )

    def centroids(self) -> Iterator[Timed]:
        """Time the mean keys and values of the clusters that each query cluster skips, on each back end that runs."""
        heads, dim = self.case.heads, self.case.dim
        rows, groups = self.case.clusters
        k, v = (torch.randn(1, heads, groups, dim, device=self.device) for _ in range(2))
        tokens = torch.randint(1, 2 * self.case.picture // groups, (1, heads, groups), device=self.device)
        bias = tokens.float().log()
        computed = torch.rand(1, heads, rows, groups, device=self.device) >= SKIPPED
        computed[..., 0] = False
        row = torch.randint(rows, (1, heads, self.case.picture), device=self.device)
        q = self.q[:, : self.case.picture]

        def gold(head: int, at: Tensor) -> tuple[Tensor, Tensor]:
            logits = q[0, at, head].double() @ k[0, head].double().mT * self.scale + tokens[0, head].double().log()
            return logits.masked_fill(computed[0, head, row[0, head, at]], -math.inf), v[0, head].double()

        given = (k, v, bias, computed, row)
        moved = 2.0 * q.numel() * q.element_size() + sum(x.numel() * x.element_size() for x in given)
        pairs = float((~computed).float().mean()) * self.case.picture * groups
        for backend in BACKENDS:
            if not unsupported_reasons(backend, q):
                run = partial(pooled_attention, q, *given, self.scale, backend=backend)
                name = f"centroids {rows}x{groups} {backend}"
                yield self.timed(name, run, gold, moved=moved, flops=4.0 * heads * pairs * dim)


@torch.no_grad()
def branch_rows(case: Case, device: torch.device) -> Iterator[Timed]:
    """Check each branch of one model; what is yielded may be timed."""
    call = Call(case, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    blocks = -(-call.length // BLOCK)
    chosen = torch.randperm(blocks, device=device)[: max(1, round(COLUMNS * blocks))].sort().values
    yield call.blocks(f"columns {COLUMNS:.0%}", call.q, call.k, call.v, chosen)
    if case.text:
        k, v = (x[:, case.picture :] for x in (call.k, call.v))
        words = torch.arange(-(-case.text // BLOCK), device=device)
        yield call.blocks(f"text keys {case.text}", call.q, k, v, words)
        both = (x.expand(2, -1, -1, -1) for x in (k, v))
        yield call.blocks(f"text keys {case.text}, 2 samples", torch.cat([call.q, call.q.flip(1)]), *both, words)
        every = torch.arange(blocks, device=device)
        yield call.blocks(f"text queries {case.text}", call.q[:, case.picture :], call.k, call.v, every)
    yield from call.centroids()
