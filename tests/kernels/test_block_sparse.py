"""One table for all back ends; on a CPU the Triton kernel is interpreted (see conftest)."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import BF16, CASES, FP32, HALF, random_case
from attention_gold import check, dense, make_call, pair_mask

from dit_accel.kernels.block_sparse import block_sparse_attention, unsupported_reasons
from dit_accel.kernels.block_sparse.api import _checked

BACKENDS = ["reference", "triton"] if torch.cuda.is_available() else ["reference", "cpu", "triton"]
on_all = pytest.mark.parametrize("backend", BACKENDS)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def run(call, backend, **changes):
    return block_sparse_attention(**{**call, **changes}, backend=backend)


@on_all
@pytest.mark.parametrize("case", CASES)
def test_matches_gold(case, backend, device):
    call = make_call(**CASES[case], device=device)
    check(call, *run(call, backend))


def tiles():
    from dit_accel.kernels.block_sparse.tiles import Tile

    return {
        "pointers": Tile(32, 16, 4, 2),
        "descriptors": Tile(64, 32, 4, 2, tma=True),
        "packed": Tile(64, 32, 4, 2, tma=True, pack=True),
        "packed-pointers": Tile(64, 64, 4, 2, pack=True),
    }


@pytest.mark.parametrize("tile", ["pointers", "descriptors", "packed", "packed-pointers"])
@pytest.mark.parametrize("case", ["dim-40", "lengths-differ", "orders", "orders-holes-bias", "grouped-heads", "box"])
def test_every_way_to_load_matches_gold(case, tile, device):
    from dit_accel.kernels.block_sparse.triton import attend

    call = make_call(**{**CASES[case], "block_q": 64, "dtype": HALF}, device=device)
    check(call, *attend(problem_of(call), tiles()[tile]))


@pytest.mark.parametrize("pack", [True, False])
def test_every_query_in_a_slot_and_keys_left_where_they_lie(pack, device):
    """Nothing is filled in first, so what is not written would be NaN."""
    from dit_accel.kernels.block_sparse.triton import attend

    call = make_call(**{**CASES["orders-holes"], "block_q": 64, "dtype": HALF}, device=device)
    check(call, *attend(replace(problem_of(call), every_query=True, pack=pack), tiles()["packed"]))


def problem_of(call):
    names = ("full_count", "q_order", "k_order", "key_bias", "predicate", "scale")
    first = [call[n] for n in ("q", "k", "v", "index", "count", "block_q", "block_k")]
    return _checked(*first, *(call.get(n) for n in names))


@on_all
def test_all_blocks_full_is_said_by_passing_count(backend, device):
    call = make_call(orders=True, q_len=128, dtype=BF16, predicate="box", device=device)
    call["full_count"] = call["count"]
    check(call, *run(call, backend))


@on_all
def test_density_one_is_dense(backend, device):
    call = make_call(density=1.1, q_len=129, device=device)
    out, _ = run(call, backend)
    q, k, v = (call[n].transpose(1, 2).double() for n in ("q", "k", "v"))
    gold = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert (out - gold).abs().max() < 2e-6


@on_all
@pytest.mark.parametrize("case", ["orders-holes", "box-orders-holes-bias", "list-per-head", "bias-inf"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_no_query_sees_does_not_leak(case, poison, backend, device):
    call = make_call(**CASES[case], device=device)
    # keys that no query sees: unselected, masked by bias, or nobody's neighbour
    unseen = (~pair_mask(call).any(2)).all(1)  # [B, Sk]
    if not unseen.any():  # then make some
        call["key_bias"] = torch.zeros(1, 1, call["k"].shape[1], device=device)
        call["key_bias"][..., ::3] = -math.inf
        unseen = (~pair_mask(call).any(2)).all(1)
    assert unseen.any()
    results = []
    for value in (0.0, poison):
        k, v = call["k"].clone(), call["v"].clone()
        k[unseen.to(device)] = value
        v[unseen.to(device)] = value
        results.append(run(call, backend, k=k, v=v))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@on_all
def test_nothing_is_read_behind_the_last_token(backend, device):
    call = make_call(q_len=97, density=1.1, device=device)
    for name in ("q", "k", "v"):
        roomy = torch.full((1, 128, 2, 64), math.nan, device=device)
        roomy[:, :97] = call[name]
        call[name] = roomy[:, :97]
    check(call, *run(call, backend))


def strided(tensor, how):
    if how == "heads-first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "last-stride-2":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if how == "slice-of-more":
        return torch.cat([tensor, tensor, tensor], 2)[:, :, tensor.shape[2] : 2 * tensor.shape[2]]
    if how == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape)
    return tensor[:, :, :1].expand_as(tensor)


@on_all
@pytest.mark.parametrize("how", ["heads-first", "last-stride-2", "slice-of-more", "offset", "expanded"])
def test_any_strides(how, backend, device):
    call = make_call(dtype=HALF, device=device)
    call |= {name: strided(call[name], how) for name in ("q", "k", "v")}
    check(call, *run(call, backend))


@on_all
@pytest.mark.parametrize("outlier", ["large-q", "large-k", "fp16-edge", "lse-plus-80", "lse-minus-80", "other-scale"])
def test_outliers(outlier, backend, device):
    call = make_call(dtype=HALF if outlier == "fp16-edge" else FP32, q_len=129, device=device)
    if outlier == "large-q":
        call["q"] *= 5
    elif outlier == "large-k":
        call["k"] += 20
    elif outlier == "fp16-edge":
        call["v"] = call["v"].sign() * 65000
        call["q"] *= 1e-3
        call["k"] *= 1e3
    elif outlier == "other-scale":
        call["scale"] = 1.7
    else:
        level = 80.0 if "plus" in outlier else -80.0
        call["key_bias"] = torch.full((1, 1, 129), level, device=device)
    check(call, *run(call, backend))


@on_all
@pytest.mark.parametrize(
    ("batch", "q_len", "k_len", "width"), [(0, 64, 64, 1), (1, 0, 64, 1), (1, 64, 0, 0), (1, 64, 64, 0)]
)
def test_empty(batch, q_len, k_len, width, backend, device):
    q = torch.randn(batch, q_len, 2, 64, device=device)
    k = torch.randn(batch, k_len, 2, 64, device=device)
    index = torch.zeros(1, 1, q_len // 64, width, dtype=torch.int32, device=device)
    count = torch.ones(1, 1, q_len // 64, dtype=torch.int32, device=device)
    out, lse = block_sparse_attention(q, k, k, index, count, block_q=64, block_k=64, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, q_len)
    assert not out.any()
    assert (lse == -math.inf).all()


@on_all
def test_queries_without_a_slot_are_zero(backend, device):
    call = make_call(orders=True, q_len=128, density=1.1, device=device)
    call["q_order"][..., 5:20] = -1
    check(call, *run(call, backend))


@on_all
def test_repeats_are_equal(backend, device):
    call = make_call(**CASES["orders-holes"], device=device)
    first, again = run(call, backend), run(call, backend)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@on_all
@pytest.mark.parametrize("seed", range(6))
def test_random_sweep(seed, backend, device):
    sweep(seed, backend, device)


@pytest.mark.full
@on_all
@pytest.mark.parametrize("seed", range(6, 306))
def test_long_random_sweep(seed, backend, device):
    sweep(seed, backend, device)


def sweep(seed, backend, device):
    case = random_case(seed)
    print(case)
    call = make_call(**case, device=device)
    check(call, *run(call, backend))


# --- the checker itself: each of these mistakes must be caught ---

MISTAKES = {
    "heads-swapped": lambda call: (run(call, "reference")[0].flip(2), run(call, "reference")[1]),
    "index-off-by-one": lambda call: run(call, "reference", index=(call["index"] + 1) % call["index"].shape[3]),
    "scale": lambda call: run(call, "reference", scale=1.05 * call["q"].shape[3] ** -0.5),
    "last-block-dropped": lambda call: run(call, "reference", count=(call["count"] - 1).clamp(min=0)),
    "lse-off-by-ln2": lambda call: (run(call, "reference")[0], run(call, "reference")[1] + math.log(2)),
    "lse-in-log2": lambda call: (run(call, "reference")[0], run(call, "reference")[1] / math.log(2)),
    "sign": lambda call: (-run(call, "reference")[0], run(call, "reference")[1]),
    "v-as-k": lambda call: run(call, "reference", v=call["k"]),
    "predicate-ignored": lambda call: run(call, "reference", predicate=None),
    "bias-ignored": lambda call: run(call, "reference", key_bias=None),
    "all-partial-as-full": lambda call: run(call, "reference", full_count=call["count"]),
}


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_checker_catches(mistake, dtype):
    call = make_call(
        q_len=190, block_q=32, block_k=32, predicate="box", bias="finite", density=0.5, dtype=dtype, seed=3
    )
    with pytest.raises(AssertionError):
        check(call, *MISTAKES[mistake](call))


# --- the door ---


def test_errors_name_what_was_given():
    call = make_call()
    for change, error, words in (
        ({"block_q": 60}, ValueError, "block_q is 60"),
        ({"index": call["index"].long()}, TypeError, "index is torch.int64"),
        ({"index": call["index"][:, :, :1]}, ValueError, "expected Nq=2"),
        ({"k": call["k"][..., :32]}, ValueError, r"k \[1, 97, 2, 32\]"),
        ({"k": call["k"].half()}, TypeError, "one floating dtype"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"count": call["count"][0]}, ValueError, "count is"),
        ({"k_order": torch.zeros(1, 1, 100, dtype=torch.int32)}, ValueError, "k_order is"),
        ({"key_bias": torch.zeros(1, 1, 96)}, ValueError, "key_bias is"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"q": call["q"].clone().requires_grad_()}, RuntimeError, "no backward"),
    ):
        with pytest.raises(error, match=words):
            block_sparse_attention(**{**call, **change})


def test_a_named_backend_is_obeyed_or_refused():
    call = make_call(dtype=torch.float64)
    reasons = unsupported_reasons("triton", device=torch.device("cpu"), dtype=torch.float64, head_dim=300)
    assert len([r for r in reasons if "dtype" in r or "head dim" in r]) == 2
    with pytest.raises(RuntimeError, match="float64"):
        run(call, "triton")
    out, lse = run(call, "reference")
    gold, _ = dense(call, pair_mask(call), torch.float64)
    assert (out - gold).abs().max() < 1e-12
    assert lse.dtype == FP32


def test_gradients_are_allowed_off():
    call = make_call()
    call["q"] = call["q"].requires_grad_()
    with torch.no_grad():
        run(call, "reference")


def test_import_does_not_load_triton():
    ours = "import torch; before = 'triton' in sys.modules; import dit_accel.kernels.block_sparse"
    code = f"import sys; {ours}, dit_accel.kernels.merge; print(before == ('triton' in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"


# --- sizes and races that need a GPU ---


@needs_cuda
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [1000, 1025, 4096])
def test_longer(dim, length, device):
    for features in ({}, {"orders": True, "holes": 77, "full": True}, {"predicate": "box", "bias": "inf"}):
        call = make_call(
            dtype=BF16,
            q_len=length,
            dim=dim,
            block_q=128,
            block_k=128,
            density=0.3,
            list_heads=2,
            device=device,
            **features,
        )
        check(call, *run(call, "triton"))


@needs_cuda
@pytest.mark.parametrize("length", [32760, 75600])
def test_video_lengths_on_sampled_rows(length, device):
    blocks = -(-length // 128)
    q, k, v = (torch.randn(1, length, 4, 128, device=device, dtype=BF16) for _ in range(3))
    index = torch.rand(1, 4, blocks, blocks, device=device).argsort(-1)[..., : blocks // 10].int().contiguous()
    count = torch.full((1, 4, blocks), index.shape[3], dtype=torch.int32, device=device)
    out, lse = block_sparse_attention(q, k, v, index, count, block_q=128, block_k=128)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for token, h in ((0, 0), (length - 1, 3), (length // 2, 1)):
        cols = (index[0, h, token // 128].long()[:, None] * 128 + torch.arange(128, device=device)).flatten()
        cols = cols[cols < length]
        logits = k[0, cols, h].double() @ q[0, token, h].double() * 128**-0.5
        gold = torch.softmax(logits, 0) @ v[0, cols, h].double()
        assert (out[0, token, h] - gold).norm() / gold.norm() < 1e-2
        assert (lse[0, h, token] - torch.logsumexp(logits, 0)).abs() < 1e-3


@needs_cuda
def test_250_repeats_are_equal(device):
    call = make_call(
        dtype=BF16, batch=60, q_len=384, dim=128, block_q=128, block_k=128, density=0.7, orders=True, holes=50,
        full=True, device=device,
    )  # fmt: skip
    first = run(call, "triton")
    for _ in range(250):
        again = run(call, "triton")
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@needs_cuda
def test_two_streams_do_not_disturb_each_other(device):
    call = make_call(dtype=BF16, q_len=2048, dim=128, block_q=128, block_k=64, device=device)
    first = run(call, "triton")
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            results.append(run(call, "triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(first[0], out) for out, _ in results)


@needs_cuda
def test_offsets_beyond_31_bits(device):
    room = torch.empty(2, 200, 2**24, dtype=HALF, device=device)  # 2^31 elements are passed in the second sample
    base = make_call(dtype=HALF, batch=2, q_len=200, heads=2, dim=64, density=0.8, device=device)
    wide = dict(base)
    for at, name in enumerate(("q", "k", "v")):
        view = room[:, :, at * 128 : (at + 1) * 128].unflatten(2, (2, 64))
        view.copy_(base[name])
        wide[name] = view
    assert torch.equal(run(wide, "triton")[0], run(base, "triton")[0])
