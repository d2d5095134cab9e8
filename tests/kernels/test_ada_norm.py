"""Layer norm, scale and shift in one pass: one table for both back ends, and the roundings of stock."""

from __future__ import annotations

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.ada_norm import ada_norm

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])
EPS = 1e-5


def tokens(rng, batch, length, channels, dtype):
    """Random tokens away from mean 0, and vectors of each sample that lie side by side, as one product leaves them."""
    x = torch.randn(batch, length, channels, generator=rng).to(dtype) + 0.5
    shift, scale, _ = torch.randn(batch, 3 * channels, generator=rng).to(dtype).chunk(3, 1)
    return x, scale, shift


def slowly(x, scale, shift, weight, bias):
    """The definition in float64 without any rounding, token by token."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, sample in enumerate(x.double()):
        for s, token in enumerate(sample):
            centred = token - token.sum() / token.numel()
            normed = centred / ((centred * centred).sum() / token.numel() + EPS) ** 0.5
            normed = normed if weight is None else normed * weight.double()
            normed = normed if bias is None else normed + bias.double()
            out[b, s] = normed + normed * scale[b].double() + shift[b].double()
    return out


def stock(x, scale, shift, weight, bias):
    """What diffusers' modules compute, in the tensors' dtype."""
    norm = torch.nn.LayerNorm(x.shape[2], EPS, elementwise_affine=weight is not None, bias=bias is not None)
    norm = norm.to(x.dtype).requires_grad_(False)
    for mine, given in ((norm.weight, weight), (norm.bias, bias)):
        if given is not None:
            mine.copy_(given)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def run(given, backend, device):
    moved = [None if t is None else t.to(device) for t in given]
    return ada_norm(*moved[:3], EPS, *moved[3:], backend=backend)


def check(given, backend, device):
    """Held against float64 within twice stock's error, and against stock itself number by number."""
    got, like = run(given, backend, device), stock(*given)
    assert (got.dtype, got.shape) == (like.dtype, like.shape)
    assert got.is_contiguous()
    within_budget("out", got, slowly(*given), like)
    if got.dtype == torch.float32:
        torch.testing.assert_close(got.cpu(), like, rtol=1e-5, atol=1e-5)
    else:  # the same roundings: only where a sum in fp32 falls on the other side of a tie they part
        assert (got.cpu() != like).sum() <= 1 + got.numel() // 100


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("affine", ["", "weight", "bias"])
def test_matches_gold_and_stock(affine, dtype, backend, device):
    rng = torch.Generator().manual_seed(7)
    x, scale, shift = tokens(rng, 2, 3, 200, dtype)
    weight = torch.rand(200, generator=rng).to(dtype) + 0.5 if affine else None
    bias = torch.randn(200, generator=rng).to(dtype) if affine == "bias" else None
    check((x, scale, shift, weight, bias), backend, device)


@on_both
@pytest.mark.parametrize("seed", range(10))
def test_random_sizes_and_strides(seed, backend, device):
    rng = torch.Generator().manual_seed(300 + seed)
    batch, length, channels = (int(torch.randint(1, n, (1,), generator=rng)) for n in (4, 9, 300))
    channels = (channels, 1, 16, 256, channels)[seed % 5]
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
    print("seed", seed, batch, length, channels, dtype)
    x, scale, shift = tokens(rng, batch, length, channels, dtype)
    x = (x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0], x)[seed % 3]
    scale = scale.T.contiguous().T if seed % 2 else scale
    check((x, scale, shift, None, None), backend, device)


@on_both
def test_no_tokens(backend, device):
    x, scale, shift = tokens(torch.Generator().manual_seed(1), 2, 0, 24, torch.float32)
    assert run((x, scale, shift), backend, device).shape == (2, 0, 24)


@on_both
def test_what_is_not_finite_stays_in_its_token(backend, device):
    x, scale, shift = tokens(torch.Generator().manual_seed(2), 2, 4, 24, torch.float32)
    clean = run((x, scale, shift), backend, device).cpu()
    x[0, 1, 3], x[1, 3, 5] = float("inf"), float("nan")
    got = run((x, scale, shift), backend, device).cpu()
    assert (~got.isfinite().all(-1)).nonzero().tolist() == [[0, 1], [1, 3]]
    assert torch.equal(got[0, 2:], clean[0, 2:])
    assert torch.equal(got[1, :3], clean[1, :3])


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, "x is [2, 8]; expected [B, S, C]"),
        ({"x": torch.zeros(2, 3, 0)}, ValueError, "x is [2, 3, 0]; expected [B, S, C] with channels"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "torch.int64; expected a floating"),
        ({"scale": torch.zeros(1, 8)}, ValueError, "scale is [1, 8] torch.float32 on cpu; expected [2, 8]"),
        ({"shift": torch.zeros(2, 8).half()}, ValueError, "shift is [2, 8] torch.float16"),
        ({"weight": torch.zeros(4)}, ValueError, "weight is [4] torch.float32 on cpu; expected [8]"),
        ({"bias": torch.zeros(2, 8)}, ValueError, "bias is [2, 8]"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
        ({"scale": torch.zeros(2, 8, requires_grad=True)}, RuntimeError, "scale: a gradient is asked for"),
        ({"x": torch.zeros(1, 1, 20_000), "scale": torch.zeros(1, 20_000), "shift": torch.zeros(1, 20_000),
          "backend": "triton"}, RuntimeError, "20000 channels are more than 16384"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_was_given(changed, error, words):
    vector = torch.zeros(2, 8)
    given = {"x": torch.zeros(2, 3, 8), "scale": vector, "shift": vector, "eps": EPS, "backend": "reference", **changed}
    with pytest.raises(error) as told:
        ada_norm(**given)
    assert words in str(told.value)
