"""Norm and rotation of queries and keys in one pass: one table for both back ends, and the roundings of stock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_gold import within_budget
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from dit_accel.kernels.qk_norm_rope import Norm, Part, qk_norm_rope

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])
NORMS = {
    "rms": Norm(),
    "rms across heads": Norm(across_heads=True),
    "rms, rounds first": Norm(rounds_first=True),
    "layer": Norm("layer", eps=1e-5),
    "layer across heads": Norm("layer", across_heads=True),
}
FIELDS = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias")


def part_of(rng, length, norm, *, batch=2, heads=3, dim=40, dtype=torch.float32, affine="weight"):
    """Random queries and keys away from mean 0, with weights and biases as asked."""
    size = heads * dim if norm.across_heads else dim
    made = [torch.randn(batch, length, heads, dim, generator=rng).to(dtype) + 0.25 for _ in range(2)]
    made += [torch.rand(size, generator=rng).to(dtype) + 0.5 for _ in range(2)] if affine else [None, None]
    made += [torch.randn(size, generator=rng).to(dtype) for _ in range(2)] if affine == "bias" else [None, None]
    return Part(*made)


def tables_of(rng, rows, width):
    angle = torch.rand(rows, width, generator=rng) * 6.3
    return angle.cos(), angle.sin()


def slowly(parts, norm, cos, sin, start, interleaved):
    """The definition in float64 without any rounding, token by token, head by head, pair by pair."""
    outs = []
    for x in "qk":
        each = [[getattr(part, f"{x}{end}") for end in ("", "_weight", "_bias")] for part in parts]
        joint = torch.cat([slow_part(*tensors, norm) for tensors in each], 1)
        outs.append(joint if cos is None else turned(joint, cos, sin, start, interleaved))
    return outs


def slow_part(x, weight, bias, norm):
    out = x.double().clone()
    for vectors in out:
        for token in vectors:
            for vector in [token] if norm.across_heads else list(token):
                values = vector.flatten()
                if norm.kind == "layer":
                    values = values - values.sum() / values.numel()
                values = values / ((values * values).sum() / values.numel() + norm.eps) ** 0.5
                values = values if weight is None else values * weight.double()
                values = values if bias is None else values + bias.double()
                vector.copy_(values.view(vector.shape))
    return out


def turned(x, cos, sin, start, interleaved):
    out, dim = x.clone(), x.shape[3]
    for row in range(cos.shape[0]):
        for i in range(dim // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            at = (first, second) if cos.shape[1] == dim else (i, i)
            a, b = x[:, start + row, :, first], x[:, start + row, :, second]
            out[:, start + row, :, first] = a * cos[row, at[0]].double() - b * sin[row, at[0]].double()
            out[:, start + row, :, second] = b * cos[row, at[1]].double() + a * sin[row, at[1]].double()
    return out


def stock(parts, norm, cos, sin, start, interleaved):
    """The modules that diffusers' models hold and its own rotation, in the tensors' dtype."""
    if cos is not None and cos.shape[1] < parts[0].q.shape[3]:
        cos, sin = (t.repeat_interleave(2, 1) if interleaved else t.repeat(1, 2) for t in (cos, sin))
    outs = []
    for x in "qk":
        done = []
        for part in parts:
            value = getattr(part, x)
            y = module_of(norm, getattr(part, f"{x}_weight"), getattr(part, f"{x}_bias"), value)(
                value.flatten(2) if norm.across_heads else value
            )
            done.append(y.view(value.shape))
        joint = torch.cat(done, 1)
        if cos is not None and len(cos):
            rotated = joint[:, start : start + cos.shape[0]]
            unbind = -1 if interleaved else -2
            joint[:, start : start + cos.shape[0]] = apply_rotary_emb(
                rotated, (cos, sin), sequence_dim=1, use_real_unbind_dim=unbind
            )
        outs.append(joint)
    return outs


def module_of(norm, weight, bias, like):
    size = like.shape[2] * like.shape[3] if norm.across_heads else like.shape[3]
    affine = weight is not None
    if norm.kind == "layer":
        made = torch.nn.LayerNorm(size, norm.eps, elementwise_affine=affine, bias=bias is not None)
    elif norm.rounds_first:
        made = RMSNorm(size, norm.eps, elementwise_affine=affine, bias=bias is not None)
    else:
        made = torch.nn.RMSNorm(size, norm.eps, elementwise_affine=affine)
    made = made.to(like.dtype).requires_grad_(False)
    if affine:
        made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


def moved(value, device):
    return None if value is None else value.to(device)


def run(parts, norm, cos, sin, start, interleaved, backend, device):
    parts = [Part(*(moved(getattr(part, name), device) for name in FIELDS)) for part in parts]
    tables = moved(cos, device), moved(sin, device)
    return qk_norm_rope(parts, norm, *tables, start=start, interleaved=interleaved, backend=backend)


def check(parts, norm, cos, sin, start, interleaved, backend, device):
    """Held against float64 within twice stock's error, and against stock itself number by number."""
    call = (parts, norm, cos, sin, start, interleaved)
    gold, eager = slowly(*call), stock(*call)
    ours = run(*call, backend, device)
    for name, got, right, like in zip("qk", ours, gold, eager, strict=True):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        assert got.is_contiguous()
        within_budget(name, got, right, like)
        if got.dtype == torch.float32:
            torch.testing.assert_close(got.cpu(), like, rtol=1e-5, atol=1e-5)
        else:  # the same roundings: only where a sum in fp32 falls on the other side of a tie they part
            assert (got.cpu() != like).sum() <= 1 + got.numel() // 100


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NORMS)
def test_matches_gold_and_stock(name, dtype, backend, device):
    """Two parts, tokens before and behind the rotated ones, one value a channel."""
    norm, rng = NORMS[name], torch.Generator().manual_seed(5)
    affine = "bias" if norm.kind == "layer" or norm.rounds_first else "weight"
    parts = [part_of(rng, length, norm, dtype=dtype, affine=affine) for length in (2, 3)]
    check(parts, norm, *tables_of(rng, 3, 40), 1, True, backend, device)


@on_both
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_and_strides(seed, backend, device):
    rng = torch.Generator().manual_seed(200 + seed)
    batch, heads, half = (int(torch.randint(1, n, (1,), generator=rng)) for n in (3, 6, 66))
    dim = (128, 64, 96, 2 * half)[seed % 4]
    lengths = [int(torch.randint(0, 5, (1,), generator=rng)) for _ in range(1 + seed % 2)]
    lengths[-1] += 1
    rows = int(torch.randint(0, sum(lengths) + 1, (1,), generator=rng))
    start = int(torch.randint(0, sum(lengths) - rows + 1, (1,), generator=rng))
    name = list(NORMS)[seed % len(NORMS)]
    norm, affine = NORMS[name], ("", "weight", "bias")[seed % 3]
    affine = "weight" if affine == "bias" and name.startswith("rms") and not NORMS[name].rounds_first else affine
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    interleaved, width = seed % 4 != 1, (dim, dim // 2)[seed % 5 > 2]
    print("seed", seed, batch, lengths, heads, dim, rows, start, name, affine, dtype, interleaved, width)
    made = {"batch": batch, "heads": heads, "dim": dim, "dtype": dtype, "affine": affine}
    parts = [laid(part_of(rng, length, norm, **made), seed % 4) for length in lengths]
    cos, sin = tables_of(rng, rows, 2 * width)
    check(parts, norm, cos[:, ::2], sin[:, ::2], start, interleaved, backend, device)


def laid(part, how):
    """The same numbers with other strides: as a fused projection leaves them, heads before tokens, every other one."""
    laid_out = (
        lambda x: torch.stack([x, x, x], 2)[:, :, 1],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x,
    )[how]
    return replace(part, q=laid_out(part.q), k=laid_out(part.k.clone()))


@on_both
def test_no_rotation_and_no_tokens(backend, device):
    rng = torch.Generator().manual_seed(9)
    parts = [part_of(rng, length, Norm(), affine="") for length in (0, 3)]
    check(parts, Norm(), None, None, 0, True, backend, device)
    q, k = run([parts[0]], Norm(), None, None, 0, True, backend, device)
    assert q.shape == k.shape == (2, 0, 3, 40)


@on_both
@pytest.mark.parametrize("across", [False, True])
def test_what_is_not_finite_stays_in_its_vector(across, backend, device):
    """Also an unrotated token's: 0 times infinity would be NaN in both channels of a pair."""
    norm, rng = Norm(across_heads=across), torch.Generator().manual_seed(3)
    part, (cos, sin) = part_of(rng, 4, norm, affine=""), tables_of(rng, 2, 40)
    clean = run([part], norm, cos, sin, 0, True, backend, device)
    part.q[0, 0, 1, 3], part.k[1, 3, 0, 5] = float("inf"), float("nan")
    q, k = (x.cpu() for x in run([part], norm, cos, sin, 0, True, backend, device))
    assert (~q.isfinite().all(-1)).nonzero().tolist() == [[0, 0, 1]]  # an infinite length makes all else 0
    assert (~k.isfinite().all(-1)).nonzero().tolist() == [[1, 3, head] for head in range(3 if across else 1)]
    assert k[1, 3, 0].isnan().all()
    assert torch.equal(q[1], clean[0][1].cpu())
    assert torch.equal(k[0], clean[1][0].cpu())


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"parts": []}, ValueError, "parts is empty"),
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "q is [2, 3, 4]; expected [B, S, H, D]"),
        ({"q": torch.zeros(2, 5, 3, 7)}, ValueError, "even D"),
        ({"q": torch.zeros(2, 5, 3, 8, dtype=torch.int32)}, TypeError, "torch.int32; expected a floating"),
        ({"k": torch.zeros(2, 5, 2, 8)}, ValueError, "parts[0].k is [2, 5, 2, 8]"),
        ({"k": torch.zeros(2, 5, 3, 8).half()}, ValueError, "parts[0].k is [2, 5, 3, 8] torch.float16"),
        ({"q_weight": torch.zeros(24)}, ValueError, "parts[0].q_weight is [24] torch.float32 on cpu; expected [8]"),
        ({"k_bias": torch.zeros(8).half()}, ValueError, "parts[0].k_bias is [8] torch.float16"),
        ({"norm": Norm("l2")}, ValueError, "norm.kind is 'l2'"),
        ({"sin": None}, ValueError, "cos is given alone"),
        ({"cos": torch.zeros(5, 6)}, ValueError, "cos is [5, 6]; expected [R, 8] or [R, 4]"),
        ({"sin": torch.zeros(4, 8)}, ValueError, "sin is [4, 8]"),
        ({"cos": torch.zeros(5, 8).half()}, TypeError, "cos is torch.float16"),
        ({"start": 1}, ValueError, "start is 1; 5 rotated tokens"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
        ({"q": torch.zeros(2, 5, 3, 8, requires_grad=True)}, RuntimeError, "no backward pass"),
        ({"q": torch.zeros(1, 1, 300, 64), "k": torch.zeros(1, 1, 300, 64), "backend": "triton", "cos": None,
          "sin": None}, RuntimeError, "300 heads of 64 take 32768 numbers"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_was_given(changed, error, words):
    q = torch.zeros(2, 5, 3, 8)
    given = {"norm": Norm(), "cos": torch.zeros(5, 8), "sin": torch.zeros(5, 8), "backend": "reference", **changed}
    tensors = {"q": q, "k": q, **{name: given.pop(name) for name in FIELDS if name in given}}
    parts = given.pop("parts", [Part(**tensors)])
    with pytest.raises(error) as told:
        qk_norm_rope(parts, given.pop("norm"), given.pop("cos"), given.pop("sin"), **given)
    assert words in str(told.value)
