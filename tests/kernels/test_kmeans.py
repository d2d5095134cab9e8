"""Lloyd's iteration: one table for both back ends."""

from __future__ import annotations

import math

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.kmeans import kmeans

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def tokens(seed, *, batch=2, heads=3, length=131, dim=40, clusters=10, dtype=torch.float32):
    """Tokens around a few far centres, in one `dtype`, and where to start: near, but not at, some of them."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, heads, clusters, dim, generator=rng) * 2
    which = torch.randint(clusters, (batch, heads, length), generator=rng)
    x = centres.gather(2, which[..., None].expand(-1, -1, -1, dim))
    x = (x + torch.randn(batch, heads, length, dim, generator=rng)).to(dtype)
    return x, centres + torch.randn(centres.shape, generator=rng)


def distances(x, centroids):
    return (x.double()[..., None, :] - centroids.double()[:, :, None]).square().sum(-1)  # [B, H, N, K]


def excess(distance, labels):
    """How much farther than the nearest centroid each token's own is."""
    return (distance.gather(-1, labels.long()[..., None])[..., 0] - distance.amin(-1)).amax()


def check(x, start, backend, device):
    """One iteration against its definition."""
    labels, centroids, sizes = kmeans(x.to(device), start.shape[2], 1, start.to(device), backend=backend)
    assert (labels.dtype, centroids.dtype, sizes.dtype) == (torch.int32, torch.float32, torch.int64)
    labels, sizes, x = labels.cpu(), sizes.cpu(), x.cpu()
    assert labels.min() >= 0
    assert labels.max() < start.shape[2]
    distance, rounded = distances(x, start), start.to(x.dtype)
    eager = ((x @ rounded.mT) - rounded.square().sum(-1)[:, :, None] / 2).argmax(-1)
    allowed = 2 * (excess(distance, eager) + torch.finfo(x.dtype).eps * distance.max())
    assert excess(distance, labels) <= allowed
    member = torch.nn.functional.one_hot(labels.long(), start.shape[2])
    assert torch.equal(member.sum(2), sizes)
    held = (sizes > 0)[..., None]
    gold, plain = (
        torch.where(held, (member.mT.to(kind) @ x.to(kind)) / sizes.clamp(min=1)[..., None], start.to(kind))
        for kind in (torch.float64, torch.float32)
    )
    within_budget("centroids", centroids, gold, plain)


@on_both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_an_iteration_matches_gold(dim, dtype, backend, device):
    check(*tokens(1, dim=dim, clusters=70, length=300, batch=1, heads=2, dtype=dtype), backend, device)


@on_both
@pytest.mark.parametrize("seed", range(10))
def test_random_sizes_and_strides(seed, backend, device):
    rng = torch.Generator().manual_seed(300 + seed)
    length, dim, batch, heads = (int(torch.randint(1, n, (1,), generator=rng)) for n in (290, 140, 3, 4))
    clusters = int(torch.randint(1, min(length, 150) + 1, (1,), generator=rng))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    print("seed", seed, length, dim, batch, heads, clusters, dtype)
    x, start = tokens(seed, length=length, dim=dim, batch=batch, heads=heads, clusters=clusters, dtype=dtype)
    laid = (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., ::2])
    check(laid[seed % 4], start, backend, device)


@on_both
def test_iterations_follow_each_other(backend, device):
    noise = torch.randn(1, 2, 160, 16, generator=torch.Generator().manual_seed(5))  # without clusters it goes on
    x, start = noise.bfloat16().to(device), noise[:, :, :10].to(device)
    once = kmeans(x, 10, 1, start, backend=backend)
    twice = kmeans(x, 10, 1, once[1], backend=backend)
    again = kmeans(x, 10, 2, start, backend=backend)
    assert not torch.equal(once[0], twice[0])  # there was something left to do
    for left, right in zip(twice, again, strict=True):
        assert torch.equal(left, right)


@on_both
def test_the_same_bits_every_time(backend, device):
    x, start = (t.to(device) for t in tokens(6, length=150, clusters=9, batch=1, heads=2))
    first = kmeans(x, 9, 2, start, backend=backend)
    for _ in range(250 if device == "cuda" else 2):
        for left, right in zip(first, kmeans(x, 9, 2, start, backend=backend), strict=True):
            assert torch.equal(left, right)


@on_both
def test_equal_tokens_and_clusters_without_any(backend, device):
    """Of equal centroids the first takes all; the others keep their places."""
    x = torch.ones(1, 2, 50, 16, device=device)
    labels, centroids, sizes = kmeans(x, 7, 2, backend=backend)
    assert not labels.any()
    assert sizes.tolist() == [[[50, 0, 0, 0, 0, 0, 0]] * 2]
    assert torch.equal(centroids, torch.ones_like(centroids))


@on_both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_falls_in_some_cluster_of_its_head(bad, backend, device):
    x, start = (t.to(device) for t in tokens(4, batch=2, heads=3, length=60))
    x[1, 2, 17, 5] = bad
    for iterations in (1, 3):
        labels, centroids, sizes = kmeans(x, 10, iterations, start, backend=backend)
        assert sizes.sum(-1).eq(60).all()
        assert not centroids[1, 2, int(labels[1, 2, 17])].isfinite().all()
        others = torch.ones(2, 3, dtype=torch.bool)
        others[1, 2] = False
        assert centroids.cpu()[others].isfinite().all()


def test_bad_calls_say_what_was_given():
    x = torch.zeros(1, 2, 30, 16)
    with pytest.raises(ValueError, match="'cuda'; known are"):
        kmeans(x, 3, 1, backend="cuda")
    with pytest.raises(RuntimeError, match=r"torch\.float64 is not"):
        kmeans(x.double(), 3, 1, backend="triton")
    with pytest.raises(RuntimeError, match="head dim 300"):
        kmeans(torch.zeros(1, 2, 30, 300), 3, 1, backend="triton")
    with pytest.raises(RuntimeError, match="no backward pass"):
        kmeans(x.requires_grad_(), 3, 1)
