"""What `bench_fused` times of norm and rotation: stock's modules one after the other, and the one pass, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.hosts import hunyuan_video, wan
from dit_accel.hosts.norm_rope import Projected, Rotation, normalised
from dit_accel.hosts.own import PAIRS
from dit_accel.kernels.qk_norm_rope import Norm, Part, qk_norm_rope, unsupported_reasons

Two = tuple[Tensor, Tensor]
EPS = 1e-6
SAMPLED = 64  # tokens that are held against float64
WORST_SUM = 1e-6  # relative to the largest number, of sums in fp32


@dataclass(frozen=True)
class Case:
    """A model's queries and keys: `picture` tokens that are rotated, `text` tokens with norms of their own."""

    name: str
    family: str
    picture: int
    text: int
    heads: int
    dim: int = 128


CASES = [
    Case("wan-14b-720p-81", "wan", 75_600, 0, 40),
    Case("hunyuan-720p-129", "hunyuan", 118_800, 256, 24),
    Case("flux-4096", "flux", 65_536, 512, 24),
    Case("flux-1024", "flux", 4_096, 512, 24),
]
TINY = [
    Case("tiny-wan", "wan", 5, 0, 3, 40),
    Case("tiny-hunyuan", "hunyuan", 4, 3, 2, 64),
    Case("tiny-flux", "flux", 4, 2, 2, 96),
]


@dataclass(frozen=True)
class Timed:
    """One checked operation: what to time, its error, and the bytes and FLOPs that it takes at least."""

    name: str
    run: Callable[[], Any]
    error: float
    moved: float
    flops: float = 0.0


class Call:
    """One model's call: projected tokens with norms that have weights, and tables as its family makes them."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        across = case.family == "wan"
        shape = (case.heads, case.dim)
        made: dict[str, Any] = {"device": device, "dtype": dtype}

        def norm() -> torch.nn.Module:
            from diffusers.models.normalization import RMSNorm

            cls = RMSNorm if case.family == "hunyuan" else torch.nn.RMSNorm
            module = cls(case.heads * case.dim if across else case.dim, eps=EPS).to(**made).requires_grad_(False)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            return module

        lengths = [case.text, case.picture] if case.family == "flux" else [case.picture, case.text]
        self.parts = []
        for length in filter(None, lengths):
            q, k = (torch.randn(1, length, *shape, **made) for _ in "qk")
            self.parts.append(Projected(q, k, q[:, :, :0], norm(), norm(), across))
        self.sampled = [torch.randint(part.q.shape[1], (SAMPLED,), device=device) for part in self.parts]
        self.turned = case.picture + (case.text if case.family == "flux" else 0)
        angle = torch.rand(self.turned, case.dim // 2, device=device).mul(6.3).repeat_interleave(2, 1)
        tables = (angle.cos(), angle.sin())
        self.rotary = (tables[0][None, :, None], tables[1][None, :, None]) if across else tables
        self.tables = tables
        rotations: dict[str, Rotation] = {"wan": wan.ROTATION, "hunyuan": hunyuan_video.ROTATION, "flux": PAIRS}
        self.rotation = rotations[case.family]
        self.norm = Norm(eps=EPS, across_heads=across, rounds_first=case.family == "hunyuan")

    def stock(self) -> Two:
        """The model's own modules and rotation, one after the other, as hosts run them where they may not be fused."""
        q, k, _ = normalised(self.parts)
        return self.rotation.turn(q, self.rotary), self.rotation.turn(k, self.rotary)

    def fused(self, backend: Any) -> Two:
        """The one pass."""
        given = [Part(part.q, part.k, part.norm_q.weight, part.norm_k.weight) for part in self.parts]
        tokens = sum(part.q.shape[1] for part in self.parts)
        cos, sin, start = self.rotation.tables(self.rotary, tokens)
        return qk_norm_rope(given, self.norm, cos, sin, start=start, backend=backend)

    def moved(self) -> float:
        """Bytes of queries and keys, read and written, and of the tables, read once."""
        tokens = sum(2 * part.q.numel() * part.q.element_size() for part in self.parts)
        return 2.0 * tokens + sum(table.numel() * 4 for table in self.tables)

    def error(self, got: Two) -> float:
        """Largest error of sampled tokens against float64, relative to the largest number; infinite if not finite."""
        worst, largest, first = 0.0, 0.0, 0
        for part, at in zip(self.parts, self.sampled, strict=True):
            for x, module, out in zip((part.q, part.k), (part.norm_q, part.norm_k), got, strict=True):
                gold = self._gold(x[:, at].double(), module.weight.double(), at + first)
                worst = max(worst, float((out[:, at + first] - gold).abs().nan_to_num(torch.inf).max()))
                largest = max(largest, float(gold.abs().max()))
            first += part.q.shape[1]
        return worst / largest

    def _gold(self, x: Tensor, weight: Tensor, at: Tensor) -> Tensor:
        over = (2, 3) if self.norm.across_heads else (3,)
        weight = weight.view(x.shape[2:]) if self.norm.across_heads else weight
        x = x / (x.square().mean(over, keepdim=True) + EPS).sqrt() * weight
        row = at.clamp(max=self.turned - 1)
        cos, sin = (table[row, ::2].double()[:, None] for table in self.tables)
        spun = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
        return torch.where((at < self.turned)[:, None, None], torch.view_as_real(spun).flatten(-2), x)


def norm_rope_rows(case: Case, device: torch.device) -> Iterator[Timed]:
    """Stock, stock compiled (on CUDA), and our back ends; each may err twice as much as stock, sums aside."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    call = Call(case, device, dtype)
    ways: dict[str, Callable[[], Two]] = {"stock": call.stock}
    if device.type == "cuda":
        ways["stock compiled"] = torch.compile(call.stock, fullgraph=True, dynamic=False)
    if not unsupported_reasons("triton", call.parts[0].q, call.norm):
        ways["triton"] = partial(call.fused, "triton")
    ways["reference"] = partial(call.fused, "reference")
    right = call.error(call.stock())
    for name, run in ways.items():
        error = call.error(run())
        if not error <= 2 * right + WORST_SUM:
            raise RuntimeError(f"{case.name} norm+rope {name} errs by {error:.2e}, stock by {right:.2e}: not timed")
        yield Timed(f"norm+rope {name}", run, error, call.moved())
