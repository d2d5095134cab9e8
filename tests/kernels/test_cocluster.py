"""Co-clustering: one table for both back ends."""

from __future__ import annotations

import pytest
import torch
from attention_gold import within_budget

from dit_accel.kernels.cocluster import cocluster
from dit_accel.kernels.kmeans import kmeans

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def tokens(seed, *, batch=2, heads=2, queries=61, keys=47, dim=24, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, batch, heads, 8, dim, generator=rng)
    out = []
    for side, length in zip(centres, (queries, keys), strict=True):
        which = torch.randint(8, (batch, heads, length), generator=rng)
        x = side.gather(2, which[..., None].expand(-1, -1, -1, dim))
        out.append((x + 0.5 * torch.randn(batch, heads, length, dim, generator=rng)).to(dtype))
    return out


def likeness(x, own, other):
    """Cosines of the tokens' profiles to the centroids', in float64, [B, H, N, clusters]."""
    profile, middle = (y.double() @ other.double().mT for y in (x, own))
    unit = torch.nn.functional.normalize
    return unit(profile, dim=-1) @ unit(middle, dim=-1).mT


def check(q, k, counts, backend, device):
    """One round against its definition: keys first, queries by the keys' new centroids."""
    spaced = [x[:, :, (torch.arange(n) * x.shape[2] + x.shape[2] // 2) // n].float()
              for x, n in zip((q, k), counts, strict=True)]  # fmt: skip
    found = cocluster(q.to(device), k.to(device), counts, 1, backend=backend)
    (labels_q, middle_q, sizes_q), (labels_k, middle_k, sizes_k) = [[y.cpu() for y in side] for side in found]
    for x, labels, middle, sizes, own, other in (
        (k, labels_k, middle_k, sizes_k, spaced[1], spaced[0]),
        (q, labels_q, middle_q, sizes_q, spaced[0], middle_k),
    ):
        assert (labels.dtype, middle.dtype, sizes.dtype) == (torch.int32, torch.float32, torch.int64)
        alike = likeness(x, own, other)
        missed = alike.amax(-1) - alike.gather(-1, labels.long()[..., None])[..., 0]
        eager = (x @ (torch.nn.functional.normalize(own @ other.mT, dim=-1) @ other).to(x.dtype).mT).argmax(-1)
        allowed = alike.amax(-1) - alike.gather(-1, eager[..., None])[..., 0]
        assert missed.max() <= 2 * (allowed.max() + torch.finfo(x.dtype).eps)
        member = torch.nn.functional.one_hot(labels.long(), own.shape[2])
        assert torch.equal(member.sum(2), sizes)
        gold, plain = (
            torch.where((sizes > 0)[..., None], (member.mT.to(t) @ x.to(t)) / sizes.clamp(min=1)[..., None], own.to(t))
            for t in (torch.float64, torch.float32)
        )
        within_budget("centroids", middle, gold, plain)


@pytest.mark.parametrize(
    ("backend", "seed"),
    [
        *(("reference", seed) for seed in range(6)),
        ("triton", 1),
        *(pytest.param("triton", seed, marks=pytest.mark.full) for seed in (0, 2, 3)),
    ],
)
def test_random_sizes(seed, backend, device):
    rng = torch.Generator().manual_seed(70 + seed)
    queries, keys, dim = (int(torch.randint(low, 200, (1,), generator=rng)) for low in (1, 1, 1))
    counts = tuple(int(torch.randint(1, n + 1, (1,), generator=rng)) for n in (min(queries, 40), min(keys, 70)))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    print("seed", seed, queries, keys, dim, counts, dtype)
    q, k = tokens(seed, queries=queries, keys=keys, dim=dim, dtype=dtype)
    check(q.mT.contiguous().mT, k, counts, backend, device)


@on_both
def test_rounds_follow_each_other_and_a_row_is_alone_as_in_a_batch(backend, device):
    q, k = (x.to(device) for x in tokens(3))
    together = cocluster(q, k, (6, 9), 2, backend=backend)
    first = cocluster(q, k, (6, 9), 1, backend=backend)
    again = cocluster(q, k, (6, 9), 1, (first[0][1], first[1][1]), backend=backend)
    alone = cocluster(q[1:, 1:], k[1:, 1:], (6, 9), 2, backend=backend)
    for side in (0, 1):
        for whole, next_, one in zip(together[side], again[side], alone[side], strict=True):
            assert torch.equal(whole, next_)
            assert torch.equal(whole[1:, 1:], one)
    assert not torch.equal(first[1][0], kmeans(k, 9, 1, backend=backend)[0])


@pytest.mark.parametrize(
    ("backend", "bad"), [("reference", float("nan")), ("reference", float("inf")), ("triton", float("nan"))]
)
def test_what_is_not_finite_stays_in_its_head(bad, backend, device):
    q, k = (x.to(device) for x in tokens(4))
    good = cocluster(q, k, (6, 9), 2, backend=backend)
    k[0, 1, 5, 3] = bad
    found = cocluster(q, k, (6, 9), 2, backend=backend)
    for side, count in zip(found, (6, 9), strict=True):
        assert side[0].min() >= 0
        assert side[0].max() < count
    assert not torch.isfinite(found[1][1][0, 1]).all()
    for side in (0, 1):
        for a, b in zip(found[side], good[side], strict=True):
            assert torch.equal(a[1], b[1])
            assert torch.equal(a[0, 0], b[0, 0])


def test_a_start_that_is_not_finite_is_replaced() -> None:
    q, k = tokens(5)
    start = torch.full((2, 2, 6, 24), float("nan")), torch.full((2, 2, 9, 24), float("nan"))
    for a, b in zip(cocluster(q, k, (6, 9), 2, start), cocluster(q, k, (6, 9), 2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clusters": (200, 3)}, ValueError, "clusters is 200; expected 1 to 61"),
        ({"clusters": (3, 200)}, ValueError, "clusters is 200; expected 1 to 47"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"start": (torch.zeros(1), torch.zeros(1))}, ValueError, "start is [1]"),
    ],
)
def test_bad_calls_are_refused(change, error, message):
    q, k = tokens(6)
    call = {"clusters": (4, 4), "iterations": 1, **change}
    with pytest.raises(error) as raised:
        cocluster(q, k, **call)
    assert message in str(raised.value)
