"""Attention to pooled keys: one table for all back ends."""

from __future__ import annotations

import math
import random

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.pooled import pooled_attention

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32
on_all = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])


def call(seed, *, batch=1, heads=2, length=45, dim=24, groups=11, rows=5, dtype=FP32, own=(1, 1), empty=False):
    """Random groups, of which each row may see about half; with `empty`, groups without tokens and a row with none."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 200, (*own, groups), generator=rng)
    allowed = torch.rand(*own, rows, groups, generator=rng) < 0.5
    if empty:
        tokens[..., ::3] = 0
        allowed[..., -1, :] = False
    else:
        allowed[..., 0] = True
    return {
        "q": torch.randn(batch, length, heads, dim, generator=rng).to(dtype),
        "k": torch.randn(batch, heads, groups, dim, generator=rng),
        "v": torch.randn(batch, heads, groups, dim, generator=rng),
        "bias": tokens.float().log(),
        "computed": ~allowed,
        "row": torch.randint(rows, (*own, length), generator=rng),
        "scale": 0.3,
    }


def slowly(given, dtype):
    """Every token of a group as a key of its own, with the group's means, every step in `dtype`."""
    q, k, v = (given[name].to(dtype) for name in ("q", "k", "v"))
    b, s, h, _ = q.shape
    out, lse = torch.zeros(q.shape, dtype=dtype), torch.full((b, h, s), -math.inf, dtype=dtype)
    every = {name: given[name].expand(b, h, *given[name].shape[2:]) for name in ("bias", "computed", "row")}
    for i in range(b):
        for j in range(h):
            owner = torch.arange(k.shape[2]).repeat_interleave(every["bias"][i, j].exp().round().long())
            logits = q[i, :, j] @ k[i, j, owner].mT * given["scale"]
            seen = ~every["computed"][i, j][every["row"][i, j]][:, owner]
            logits = logits.masked_fill(~seen, -math.inf)
            lse[i, j] = logits.logsumexp(-1)
            out[i, :, j] = logits.softmax(-1).masked_fill(~seen, 0) @ v[i, j, owner]
    return out, lse


def moved(given, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def check(given, backend, device):
    """The kernels round mean keys and values as they do queries; the reference need not."""
    device = "cpu" if backend == "cpu" else device
    out, lse = pooled_attention(**moved(given, device), backend=backend)
    assert (out.shape, out.dtype, lse.dtype) == (given["q"].shape, given["q"].dtype, FP32)
    (gold, gold_lse), (eager, eager_lse) = (slowly(given, dtype) for dtype in (torch.float64, given["q"].dtype))
    none = gold_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, none)
    assert not out.cpu().transpose(1, 2)[none].any()
    within_budget("out", out, gold, eager)
    within_budget("lse", *(x.cpu().masked_fill(none, 0) for x in (lse, gold_lse, eager_lse)))


CASES = {
    "plain": {},
    "one query, one group": {"length": 1, "groups": 1, "rows": 1},
    "several tiles": {"length": 150, "groups": 130, "dtype": BF16, "dim": 64},
    "whole tiles": {"length": 128, "groups": 64, "dtype": HALF, "dim": 128, "heads": 1},
    "of each head and sample": {"batch": 2, "own": (2, 2)},
    "of each head": {"batch": 2, "own": (1, 2), "dtype": BF16},
    "nobody and nothing": {"empty": True},
    "nobody and nothing in half": {"empty": True, "dtype": HALF, "groups": 70},
    "wide": {"dim": 256, "heads": 1, "dtype": BF16},
    "wide in single": {"dim": 256, "heads": 1, "groups": 70, "length": 20},
    "odd": {"dim": 72, "dtype": BF16},
}


@on_all
@pytest.mark.parametrize("case", CASES)
def test_every_token_of_a_group_counts(case, backend, device):
    check(call(sorted(CASES).index(case), **CASES[case]), backend, device)


@on_all
def test_random_sweep(backend, device):
    rng = random.Random(7)
    for seed in range(6):
        made = {
            "batch": rng.randint(1, 2), "heads": rng.randint(1, 3), "length": rng.randint(1, 140),
            "dim": rng.choice((16, 40, 64, 128)), "groups": rng.randint(1, 90), "rows": rng.randint(1, 9),
            "dtype": rng.choice((BF16, HALF, FP32)), "empty": rng.random() < 0.5,
        }  # fmt: skip
        print(f"seed {seed}: {made}")
        check(call(seed, **made), backend, device)


@on_all
def test_strided_queries_are_read_as_they_lie(backend, device):
    given = call(3)
    b, s, h, d = given["q"].shape
    room = torch.full((b, h, s + 3, 2 * d), math.nan)
    strided = room[:, :, 2 : s + 2, ::2].transpose(1, 2)
    strided.copy_(given["q"])
    check({**given, "q": strided}, backend, device)


@on_all
@pytest.mark.parametrize(("groups", "first"), [(11, 0), (70, 3), (64, 16), (130, 9)])
def test_a_mask_as_bits_is_the_same_mask(groups, first, backend, device):
    """Bits of columns that are no groups, before and behind, are not looked at."""
    given = moved(call(1, groups=groups, length=20), "cpu" if backend == "cpu" else device)
    computed = given["computed"]
    around = torch.rand(*computed.shape[:3], first + groups + 5, device=computed.device) < 0.5
    around[..., first : first + groups] = computed
    ones = torch.nn.functional.pad(around.byte(), (0, -around.shape[-1] % 8)).unflatten(-1, (-1, 8))
    bits = (ones << torch.arange(8, dtype=torch.uint8, device=ones.device)).sum(-1, dtype=torch.uint8)
    right = pooled_attention(**given, backend=backend)
    for mask in (around, bits):
        for ours, theirs in zip(
            pooled_attention(**{**given, "computed": mask}, first=first, backend=backend), right, strict=True
        ):
            assert torch.equal(ours, theirs)


@on_all
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_means_in_whole_tiles_are_read_as_they_lie(dtype, backend, device):
    given = moved(call(2, groups=70, dim=64, dtype=dtype), "cpu" if backend == "cpu" else device)
    given |= {name: given[name].to(dtype).float() for name in ("k", "v")}
    right = pooled_attention(**given, backend=backend)
    more = {name: torch.nn.functional.pad(given[name].to(dtype), (0, 0, 0, 58), value=7) for name in ("k", "v")}
    for ours, theirs in zip(pooled_attention(**{**given, **more}, backend=backend), right, strict=True):
        assert torch.equal(ours, theirs)


@on_all
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_other_keys_came_to_is_merged(dtype, backend, device):
    """As attention over both; where the others came to nothing their output is not looked at, nor ours where it is."""
    given = moved(call(4, groups=70, length=50, dtype=dtype, empty=True), "cpu" if backend == "cpu" else device)
    out, lse = torch.randn_like(given["q"]), torch.randn(1, 2, 50, device=given["q"].device) * 3
    out[:, :20] = math.nan
    lse[..., :20] = -math.inf
    alone, alone_lse = pooled_attention(**given, backend="reference")
    both, both_lse = pooled_attention(**given, into=(out, lse), backend=backend)
    right_lse = torch.logaddexp(lse, alone_lse)
    shares = [(one - right_lse).exp().nan_to_num(0).mT[..., None] for one in (lse, alone_lse)]
    right = out.float().nan_to_num(0) * shares[0] + alone.float() * shares[1]
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == FP32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(both_lse, right_lse, **near)
    torch.testing.assert_close(both.float(), right, **near)
    nothing = (right_lse == -math.inf).transpose(1, 2)
    assert nothing.any()
    assert (both[nothing] == 0).all()


def test_back_ends_agree(device):
    given = moved(call(5, length=99), device)
    others = ("triton", "cpu") if device == "cpu" else ("triton",)
    ours = [pooled_attention(**given, backend=name) for name in ("reference", *others)]
    for out, lse in ours[1:]:
        torch.testing.assert_close(out, ours[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, ours[0][1], rtol=1e-5, atol=1e-5)


def test_cpu_takes_queries_in_parts_alike(monkeypatch):
    from dit_accel.kernels.pooled import cpu

    whole = pooled_attention(**call(5, length=99, empty=True), backend="cpu")
    monkeypatch.setattr(cpu, "CHUNK", 11 * 2 * 13)
    for part, all_at_once in zip(pooled_attention(**call(5, length=99, empty=True), backend="cpu"), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"k": torch.zeros(1, 2, 9, 24)}, ValueError, r"k is \[1, 2, 9, 24\]; expected \[1, 2, 11 or more, 24\]"),
        ({"q": torch.zeros(45, 2, 24)}, ValueError, r"q is \[45, 2, 24\]"),
        ({"row": torch.zeros(1, 1, 44, dtype=torch.int64)}, ValueError, r"row is \[1, 1, 44\]"),
        ({"row": torch.zeros(1, 1, 45, dtype=torch.int32)}, TypeError, "row torch.int32"),
        ({"computed": torch.zeros(1, 1, 5, 11)}, TypeError, "computed is torch.float32"),
        ({"bias": torch.ones(1, 1, 11, device="meta")}, ValueError, "bias lies on meta"),
        ({"bias": torch.ones(1, 1, 11, dtype=torch.int64)}, TypeError, "bias torch.int64"),
        ({"into": (torch.zeros(1, 45, 2, 24), torch.zeros(1, 45, 2))}, ValueError, r"into holds lse \[1, 45, 2\]"),
        ({"into": (torch.zeros(1, 45, 2, 8), torch.zeros(1, 2, 45))}, ValueError, r"into holds \[1, 45, 2, 8\]"),
        ({"first": 1}, ValueError, "first is 1; expected 0 to 0, for 11 groups in 11 columns"),
        ({"q": torch.zeros(1, 45, 2, 24, requires_grad=True)}, RuntimeError, "a gradient is asked for"),
        ({"backend": "eager"}, ValueError, "known are 'triton', 'cpu', 'reference'"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        pooled_attention(**{**call(0), **change})


def test_a_named_back_end_that_cannot_run_is_refused():
    with pytest.raises(RuntimeError, match="head dim 8 is not within"):
        pooled_attention(**call(0, dim=8), backend="triton")
    pooled_attention(**call(0, dim=8))
