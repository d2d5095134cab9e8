"""What `bench_fused` times of adaptive layer norms: stock's operations one by one, and the one pass, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_accel.eval.norm_rope_rows import Timed
from dit_accel.kernels.ada_norm import ada_norm, unsupported_reasons

EPS = 1e-6
SAMPLED = 64  # tokens that are held against float64


@dataclass(frozen=True)
class Case:
    """A block's picture tokens; `affine` where the norm has weights of its own."""

    name: str
    length: int
    channels: int
    affine: bool = False


CASES = [
    Case("hunyuan-720p-129", 118_800, 3072),
    Case("flux-4096", 65_536, 3072),
    Case("flux-1024", 4_096, 3072),
    Case("cogvideox-480p-49", 17_550, 3072, affine=True),
]
TINY = [Case("tiny-flux", 5, 40), Case("tiny-cogvideox", 3, 96, affine=True)]


@torch.no_grad()
def ada_norm_rows(case: Case, device: torch.device) -> Iterator[Timed]:
    """Stock, stock compiled (on CUDA), and our back ends; each may err twice as much as stock."""
    made = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    x = torch.randn(1, case.length, case.channels, **made) + 0.5
    shift, scale = torch.randn(1, 6 * case.channels, **made).chunk(6, 1)[:2]
    norm = torch.nn.LayerNorm(case.channels, EPS, elementwise_affine=case.affine, **made)
    if case.affine:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)

    def stock() -> Tensor:
        return norm(x) * (1 + scale[:, None]) + shift[:, None]

    ways: dict[str, Callable[[], Tensor]] = {"stock": stock}
    if device.type == "cuda":
        ways["stock compiled"] = torch.compile(stock, fullgraph=True, dynamic=False)
    given = (x, scale, shift, EPS, norm.weight, norm.bias)
    if not unsupported_reasons("triton", x):
        ways["triton"] = partial(ada_norm, *given, backend="triton")
    ways["reference"] = partial(ada_norm, *given, backend="reference")
    at = torch.randint(case.length, (SAMPLED,), device=device)
    gold = _gold(x[0, at].double(), scale, shift, norm)
    right = _error(stock()[0, at], gold)
    for name, run in ways.items():
        error = _error(run()[0, at], gold)
        if not error <= 2 * right + torch.finfo(x.dtype).eps:
            raise RuntimeError(f"{case.name} ada-norm {name} errs by {error:.2e}, stock by {right:.2e}: not timed")
        yield Timed(f"ada-norm {name}", run, error, 2.0 * x.numel() * x.element_size())


def _gold(x: Tensor, scale: Tensor, shift: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    if norm.elementwise_affine:
        normed = normed * norm.weight.double() + norm.bias.double()
    return normed * (1 + scale.double()) + shift.double()


def _error(got: Tensor, gold: Tensor) -> float:
    """Largest error, relative to the largest number; infinite if not finite."""
    return float((got.double() - gold).abs().nan_to_num(torch.inf).max() / gold.abs().max())
