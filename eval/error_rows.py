"""What `bench_fused` times of a choice by error: how far means are from the units they would stand for.

Queries are means of runs of 128 tokens; units are runs of an order that all heads share, as the presets cut keys, 64 or
128 tokens long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_accel.eval.norm_rope_rows import Timed
from dit_accel.kernels.choice import Backend
from dit_accel.kernels.unit_error import unit_error

QUERIES = 128  # tokens that one mean query stands for
BACKENDS: tuple[Backend, ...] = ("triton", "reference")
SAMPLED = 8  # queries a head that are held against float64
WORST = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """A model's tokens, heads and head dim, and the tokens of a unit."""

    name: str
    length: int
    heads: int
    dim: int = 128
    units: tuple[int, ...] = (64, 128)


CASES = [Case("wan-14b-720p-81", 75_600, 40), Case("flux-4096", 66_048, 24)]
TINY = [Case("tiny-wan", 333, 2, 16, (48,))]


def gold(queries: Tensor, k: Tensor, v: Tensor, units: Tensor, scale: float) -> Tensor:
    """The errors of some queries [R, D] of one head at every unit, float64; `units` [units, tokens], -1 a hole."""
    real, at = units >= 0, units.clamp(min=0)
    keys, values = k[at].double(), v[at].double()
    logits = (queries @ keys.flatten(0, 1).mT * scale).unflatten(1, at.shape).masked_fill(~real, float("-inf"))
    weights, tokens = (logits - logits.amax((1, 2), keepdim=True)).exp(), real.sum(1)
    middle = logits.masked_fill(~real, 0).sum(2) / tokens - logits.amax((1, 2))[:, None]
    means = (values * real[..., None]).sum(1) / tokens[:, None]
    apart = torch.einsum("rut,utd->rud", weights, values) - (middle.exp() * tokens)[..., None] * means
    return apart.norm(dim=-1) / weights.sum((1, 2))[:, None]


def means_of(v: Tensor, units: Tensor) -> Tensor:
    """The mean values of the units, float32 [1, H, units, D]."""
    real = (units >= 0)[..., None, None]
    return ((v[0, units.clamp(min=0)].float() * real).sum(1) / real.sum(1)).transpose(0, 1)[None]


@torch.no_grad()
def error_rows(case: Case, device: torch.device) -> Iterator[Timed]:
    """Check the errors on sampled queries of every head; RuntimeError where one is wrong, else it may be timed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    k, v = (torch.randn(1, case.length, case.heads, case.dim, device=device, dtype=dtype) for _ in range(2))
    rows, scale = -(-case.length // QUERIES), case.dim**-0.5
    queries = torch.randn(1, case.heads, rows, case.dim, device=device).to(dtype).float()
    for size in case.units:
        order = torch.nn.functional.pad(torch.randperm(case.length, device=device), (0, -case.length % size), value=-1)
        units = order.view(-1, size)
        bounds = torch.arange(len(units) + 1, device=device)[None, None] * size
        means = torch.cat([means_of(v[:, :, h : h + 1], units) for h in range(case.heads)], 1)
        given = (queries, k, v, order.int()[None, None], bounds, 16, means, scale)
        for backend in BACKENDS if device.type == "cpu" else BACKENDS[:1]:
            run, name = partial(unit_error, *given, backend=backend), f"errors {rows}x{len(units)} {backend}"
            error = _checked(run(), given, units)
            if not error <= WORST[dtype]:
                raise RuntimeError(f"{case.name} {name} errs by {error:.2e}: not timed")
            moved = 2.0 * k.numel() * k.element_size() + 4.0 * case.heads * rows * len(units)
            yield Timed(name, run, error, moved, flops=4.0 * case.heads * rows * case.length * case.dim)


def _checked(out: Tensor, given: tuple, units: Tensor) -> float:
    """The relative error of sampled queries of every head."""
    queries, k, v, *_, scale = given
    missed = whole = 0.0
    for head in range(k.shape[2]):
        at = torch.randint(out.shape[2], (SAMPLED,), device=out.device)
        right = gold(queries[0, head, at].double(), k[0, :, head], v[0, :, head], units, scale)
        missed += float((out[0, head, at] - right).square().sum())
        whole += float(right.square().sum())
    return (missed / whole) ** 0.5
