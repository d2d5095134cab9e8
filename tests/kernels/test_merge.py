"""Merging branches over disjoint keys gives attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.merge import merge_attention

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def branches(n, dtype, device, dim=40):
    rng = torch.Generator().manual_seed(n)
    outs = [torch.randn(2, 37, 3, dim, generator=rng).to(dtype) for _ in range(n)]
    lses = [torch.randn(2, 3, 37, generator=rng) * 3 for _ in range(n)]
    for at in range(n):  # a branch is silent somewhere, and all of them at token 7
        lses[at][:, :, at::5] = -math.inf
        lses[at][:, :, 7] = -math.inf
        outs[at][:, 7] = math.nan
    return [x.to(device) for x in outs], [x.to(device) for x in lses]


def merged(outs, lses, dtype):
    stacked = torch.stack([x.cpu().to(dtype) for x in lses])
    lse = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - lse.masked_fill(lse == -math.inf, 0)).transpose(2, 3).unsqueeze(-1)
    values = torch.stack([x.cpu().to(dtype) for x in outs]).nan_to_num(0)
    return (weights * values).sum(0), lse


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_matches_gold(n, dtype, backend, device):
    outs, lses = branches(n, dtype, device)
    out, lse = merge_attention(outs, lses, backend=backend)
    gold_out, gold_lse = merged(outs, lses, torch.float64)
    eager_out, _ = merged(outs, lses, dtype)
    within_budget("out", out, gold_out, eager_out)
    assert torch.equal(lse.cpu() == -math.inf, gold_lse == -math.inf)
    assert (lse.cpu() - gold_lse).nan_to_num(0).abs().max() < 2e-6
    assert not out[:, 7].any()


@on_both
def test_parts_of_attention_make_the_whole(backend, device):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 50, 2, 16, generator=rng) for _ in range(3))

    def attend(cols):
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k[:, cols]) / 4
        out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v[:, cols])
        return out.contiguous().to(device), logits.logsumexp(-1).to(device)

    parts = [attend(slice(0, 10)), attend(slice(10, 35)), attend(slice(35, 50))]
    out, lse = merge_attention(*zip(*parts, strict=True), backend=backend)
    whole_out, whole_lse = attend(slice(0, 50))
    assert (out - whole_out).abs().max() < 1e-6
    assert (lse - whole_lse).abs().max() < 1e-6


@on_both
def test_far_apart_branches_do_not_overflow(backend, device):
    outs, lses = branches(2, torch.float32, device)
    out, lse = merge_attention(outs, [lses[0] + 1e4, lses[1] - 1e4], backend=backend)
    heard = (lses[0] > -math.inf).transpose(1, 2).unsqueeze(-1).expand_as(out)
    assert torch.equal(out[heard], outs[0][heard])
    assert not lse.isnan().any()


def test_more_branches_than_the_kernel_takes():
    outs, lses = branches(6, torch.float32, "cpu")
    out, _ = merge_attention(outs, lses)
    gold, eager = (merged(outs, lses, dtype)[0] for dtype in (torch.float64, torch.float32))
    within_budget("out", out, gold, eager)
    with pytest.raises(RuntimeError, match="6 branches"):
        merge_attention(outs, lses, backend="triton")


def test_empty_and_errors():
    out, lse = torch.zeros(0, 5, 2, 16), torch.zeros(0, 2, 5)
    assert merge_attention([out, out], [lse, lse])[0].shape == out.shape
    with pytest.raises(ValueError, match="1 outs and 2 lses"):
        merge_attention([out], [lse, lse])
    with pytest.raises(ValueError, match="expected"):
        merge_attention([out], [lse.transpose(1, 2)])
    with pytest.raises(TypeError, match=r"torch\.float64"):
        merge_attention([out], [lse.double()])
