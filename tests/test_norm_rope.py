"""Hosts with norm and rotation in one pass: stock processors' own queries and keys, and stock wherever it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_hosts import FULL
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.hosts import norm_rope
from dit_accel.hosts.norm_rope import Projected, Rotation, from_the_first, fused, normalised
from dit_accel.hosts.own import PAIRS
from dit_accel.kernels.choice import prefer

FAMILIES = ["flux", "wan_two_experts", "hunyuan_video", "cogvideox", "cogvideox_rotary"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Watch(TorchFunctionMode):
    """Keeps the queries and keys [B, S, H, D] of each self-attention of stock code."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Pairs()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            q, k = (given[name].transpose(1, 2) for name in ("query", "key"))
            if q.shape == k.shape:
                self.seen.append((q.clone(), k.clone()))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Let hosts take the fused pass on any device, and write down how many parts each pass had.

    The operation runs in torch, because Triton's interpreter takes seconds; a parameter "triton" runs it there.
    """
    counted: list[int] = []
    operation = norm_rope.qk_norm_rope

    def count(parts: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(parts))
        return operation(parts, *args, **{**kwargs, "backend": getattr(request, "param", "reference")})

    monkeypatch.setattr(norm_rope, "wants_triton", lambda x: True)
    monkeypatch.setattr(norm_rope, "qk_norm_rope", count)
    return counted


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline whose norms have weights, and tables that stay float32, as where weights are loaded."""
    pipe, call = tiny.FAMILIES[name]()
    for part, module in pipe.transformer.named_modules():
        if part.rsplit(".", 1)[-1].startswith("norm_") and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    pipe.to(DEVICE, dtype)
    if hasattr(pipe.transformer, "rope"):
        pipe.transformer.rope.float()
    return pipe, call


def seen_by_us(pipe: Any, call: dict[str, Any]) -> Pairs:
    """The queries and keys of each attention call of an accelerated pipeline."""
    ours = Pairs()

    def watch(attention: AttentionCall, *_: Any) -> None:
        ours.append((attention.q.clone(), attention.k.clone()))

    with dit_accel.accelerate(pipe, FULL) as handle:
        handle.watchers = (watch,)
        tiny.generate(pipe, call, steps=1)
        assert handle.report().sparse_calls == len(ours)
    return ours


def seen_by_stock(pipe: Any, call: dict[str, Any], like: torch.Tensor) -> Pairs:
    """The same of the stock pipeline; it attends HunyuanVideo's padding, which comes last and is cut off."""
    with Watch() as stock:
        tiny.generate(pipe, call, steps=1)
    length, heads = like.shape[1:3]
    return [(q[:, :length], k[:, :length]) for q, k in stock.seen if q.shape[1] >= length and q.shape[2] == heads]


def check_like_stock(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    """At the first site what comes in is equal, and so are all roundings; later ones inherit what attention rounds.

    On a GPU products of another length may round otherwise too (our HunyuanVideo projects no padding), and so does
    attention, whose kernel is another than stock's.
    """
    exact = DEVICE == "cpu"
    pipe, call = built(name, dtype)
    ours = seen_by_us(pipe, call)
    assert len(calls) == len(ours) > 0
    assert max(calls) == (2 if name in ("flux", "hunyuan_video") else 1)
    theirs = seen_by_stock(pipe, call, ours[0][0])
    for at, (mine, right) in enumerate(zip(ours, theirs, strict=True)):
        for got, expected in zip(mine, right, strict=True):
            assert got.dtype == expected.dtype == dtype
            off = (got != expected).float().mean()
            if dtype == torch.float32:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 if exact else 1e-4)
            else:
                assert off < ((1e-3 if at == 0 else 2e-2) if exact else 0.1)
                torch.testing.assert_close(got, expected, rtol=2**-6, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_are_those_of_the_stock_processor(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    check_like_stock(name, dtype, calls)


@pytest.mark.full
@pytest.mark.parametrize("calls", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_gives_those_of_the_stock_processor(name: str, dtype: torch.dtype, calls: list[int]) -> None:
    check_like_stock(name, dtype, calls)


@pytest.mark.parametrize("name", ["flux", "wan_two_experts"])
def test_fused_projections_are_read_where_they_lie(name: str, calls: list[int]) -> None:
    pipe, call = built(name)
    pipe.transformer.fuse_qkv_projections()
    if name == "wan_two_experts":
        pipe.transformer_2.fuse_qkv_projections()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, FULL):
        torch.testing.assert_close(tiny.generate(pipe, call), stock, rtol=1e-4, atol=1e-4)
    assert calls


# --- where it stays stock --------------------------------------------------------------------------------------------
def hooked(norm: torch.nn.Module) -> torch.nn.Module:
    norm.register_forward_hook(lambda module, args, output: output + 1)
    return norm


def replaced(norm: torch.nn.Module) -> torch.nn.Module:
    norm.forward = lambda x: x  # as accelerate's hooks and diffusers' offloading do
    return norm


class Adapted(torch.nn.RMSNorm):
    """As an adapter wraps a norm: its class is not torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


CHANGES: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "a hook": hooked,
    "a replaced forward": replaced,
    "another class": lambda norm: Adapted(16, eps=1e-6),
    "no eps": lambda norm: torch.nn.RMSNorm(16),
    "another shape": lambda norm: torch.nn.RMSNorm((3, 16), eps=1e-6),
    "another eps than its twin": lambda norm: torch.nn.RMSNorm(16, eps=1e-5),
    "another norm than its twin": lambda norm: torch.nn.LayerNorm(16, eps=1e-6),
    "no norm": lambda norm: torch.nn.Identity(),
    "a trained weight": lambda norm: norm.requires_grad_(True),
    "half weights": lambda norm: norm.half(),
}


def projected(dtype: torch.dtype = torch.float32) -> Projected:
    q, k, v = torch.randn(3, 2, 5, 3, 16, dtype=dtype, device=DEVICE)
    norms = [torch.nn.RMSNorm(16, eps=1e-6, dtype=dtype, device=DEVICE).requires_grad_(False) for _ in range(2)]
    return Projected(q, k, v, *norms)


def test_an_unknown_norm_is_run_itself() -> None:
    """Every change keeps the fused pass away; without one it is taken, through `prefer` alone."""
    rotary = (torch.randn(5, 16, device=DEVICE), torch.randn(5, 16, device=DEVICE))
    part = projected()
    with prefer("reference"):
        assert fused([part], PAIRS, rotary) is None
    if DEVICE == "cpu":
        assert fused([part], PAIRS, rotary) is None
    with prefer("triton"):
        turned = fused([part], PAIRS, rotary)
        assert turned is not None
        q, k, v = normalised([part])
        for got, expected in zip(turned, (PAIRS.turn(q, rotary), PAIRS.turn(k, rotary), v), strict=True):
            torch.testing.assert_close(got, expected)
        for change, make in CHANGES.items():
            part = projected()
            changed = Projected(part.q, part.k, part.v, part.norm_q, make(part.norm_k).to(DEVICE))
            assert fused([changed], PAIRS, rotary) is None, change
            assert fused([part, changed], PAIRS, rotary) is None, change
        with torch.autocast(DEVICE):
            assert fused([projected()], PAIRS, rotary) is None
        part = projected(torch.float64)
        assert fused([part], PAIRS, rotary) is None


def test_tables_that_do_not_fit_are_left_to_stock() -> None:
    part, table, longer = projected(), torch.randn(5, 16, device=DEVICE), torch.randn(6, 16, device=DEVICE)
    partly = Rotation(PAIRS.turn, from_the_first, partly=True)
    with prefer("triton"):
        for wrong in (table.bfloat16(), table[None], table[:, :6], table[:4], longer):
            assert fused([part], PAIRS, (wrong, wrong)) is None
        assert fused([part], partly, (table[:4], table[:4])) is not None
        assert fused([part], partly, (longer, longer)) is None


def test_stages_get_tokens_before_rotation(calls: list[int]) -> None:
    pipe, call = built("wan_two_experts")
    with dit_accel.accelerate(pipe, FULL) as handle:
        fast = tiny.generate(pipe, call)
        passes = len(calls)
        seen: list[AttentionCall] = []

        def stage(attention: AttentionCall) -> AttentionCall:
            seen.append(attention)
            return attention

        handle.stages = (stage,)
        torch.testing.assert_close(tiny.generate(pipe, call), fast, rtol=1e-4, atol=1e-4)
    assert passes == len(calls) == len(seen) > 0
    assert all(attention.q_raw is not None and attention.rotate is not None for attention in seen)


def test_compiled_code_traces_the_modules(calls: list[int]) -> None:
    """Inductor fuses them itself, and what it does around an opaque operation is less."""
    torch._dynamo.reset()
    pipe, call = built("wan_two_experts")
    with dit_accel.accelerate(pipe, FULL):
        eager = tiny.generate(pipe, call)
        passes = len(calls)
        for transformer in (pipe.transformer, pipe.transformer_2):
            transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tiny.generate(pipe, call), eager, rtol=1e-4, atol=1e-4)
    assert passes == len(calls) > 0
    torch._dynamo.reset()
