"""Attention on int8 queries and keys: the table of `attention_cases`, held to a slow restatement of the rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import BF16, CASES, FP32, HALF, random_case
from attention_gold import make_call, pair_mask
from quantised_gold import check_rounded

from dit_accel.kernels.block_sparse import block_sparse_attention, quantised, unsupported_reasons
from dit_accel.kernels.merge import merge_attention

BACKENDS = ["reference", "triton"] if torch.cuda.is_available() else ["reference", "cpu", "triton"]
on_all = pytest.mark.parametrize("backend", BACKENDS)
KEPT = [
    *("dim-16", "dim-80", "odd-blocks", "grouped-heads", "list-per-sample", "bias-inf"),
    *("orders-holes-bias", "orders-full-behind-holes", "box-orders-holes-bias"),
]  # what the default run takes of the table


def run(call, backend, **changes):
    return block_sparse_attention(**{**call, **changes}, precision="int8", backend=backend)


def made(case, backend, device="cpu"):
    """A call of the table; the kernel takes no fp32."""
    dtype = case.get("dtype", FP32)
    return make_call(**{**case, "dtype": HALF if dtype == FP32 and backend == "triton" else dtype}, device=device)


@on_all
@pytest.mark.parametrize("case", KEPT)
def test_matches_gold(case, backend, device):
    call = made(CASES[case], backend, device)
    check_rounded(call, *run(call, backend))


@pytest.mark.full
@on_all
@pytest.mark.parametrize("case", sorted(set(CASES) - set(KEPT)))
def test_the_rest_of_the_table_matches_gold(case, backend, device):
    test_matches_gold(case, backend, device)


def sweep(seed, backend, device):
    case = random_case(seed)
    print(case)
    call = made(case, backend, device)
    check_rounded(call, *run(call, backend))


@on_all
@pytest.mark.parametrize("seed", range(2))
def test_random_sweep(seed, backend, device):
    sweep(seed, backend, device)


@pytest.mark.full
@on_all
@pytest.mark.parametrize("seed", range(2, 102))
def test_long_random_sweep(seed, backend, device):
    sweep(seed, backend, device)


@on_all
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_a_mean_of_the_keys_costs_no_accuracy(offset, backend, device):
    """On noise, which is the hardest there is for values: nothing adds up but the errors."""
    call = made({"q_len": 150, "dim": 128, "dtype": BF16, "heads": 1}, backend, device)
    call["k"] += offset * torch.randn(1, 1, 1, 128, device=device)
    assert check_rounded(call, *run(call, backend)) < 2e-2


@on_all
def test_outliers_coarsen_their_block_alone(backend, device):
    call = made({"q_len": 128, "block_q": 32, "block_k": 32, "density": 1.1, "dtype": HALF}, backend, device)
    call["k"][:, 40, :, 3] = 300.0
    call["q"][:, 50, :, 7] = 200.0
    check_rounded(call, *run(call, backend))
    call["index"], call["count"] = call["index"].sort(-1).values, torch.ones_like(call["count"])  # block 0 alone
    assert check_rounded(call, *run(call, backend)) < 3e-2


@on_all
def test_equal_keys_and_zero_queries(backend, device):
    call = made({"q_len": 70, "dtype": HALF}, backend, device)
    call["k"][:] = call["k"][:, :1]
    call["q"][:, 10:20] = 0
    check_rounded(call, *run(call, backend))


@on_all
@pytest.mark.parametrize(
    ("case", "poison"), [("orders-holes", math.nan), ("list-per-head", math.inf), ("bias-inf", math.nan)]
)
def test_what_no_query_sees_does_not_leak(case, poison, backend, device):
    call = made(CASES[case], backend, device)
    unseen = (~pair_mask(call).any(2)).all(1)  # [B, Sk]
    if not unseen.any():
        call["index"], call["count"] = call["index"].sort(-1).values, torch.ones_like(call["count"])
        unseen = (~pair_mask(call).any(2)).all(1)
    assert unseen.any()
    results = []
    for value in (0.0, poison):
        k, v = call["k"].clone(), call["v"].clone()
        k[unseen.to(device)] = value
        v[unseen.to(device)] = value
        results.append(run(call, backend, k=k, v=v))
    assert results[0][0].isfinite().all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@on_all
@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_a_bad_key_shows_where_its_block_is_computed(poison, backend, device):
    call = made({"q_len": 64, "block_q": 16, "block_k": 16, "density": 0.5, "dtype": HALF}, backend, device)
    call["k"][0, 20, 1, 5] = poison
    out, lse = run(call, backend)
    meets = pair_mask(call)[0, 1, :, 20].to(device)
    assert meets.any()
    assert not meets.all()
    assert out[0, meets, 1].isnan().all()
    assert lse[0, 1, meets].isnan().all()
    assert out[0, ~meets].isfinite().all()
    call["q"][0, 3] = poison
    out, _ = run(call, backend)
    assert torch.equal(out[0, 3].isnan().all(-1), pair_mask(call)[0, :, 3].any(-1).to(device))


@on_all
def test_branches_merge_as_one_call(backend, device):
    """The log-sum-exps of both halves hold what the mean took, so their union is the whole, whatever the mean was."""
    call = made({"q_len": 80, "block_q": 16, "block_k": 16, "density": 1.1, "dtype": HALF}, backend, device)
    call["k"] += 3.0
    whole = run(call, backend)
    half = torch.full_like(call["count"], 2)
    first = run(call, backend, count=half)
    second = run(call, backend, index=call["index"].roll(-2, -1).contiguous(), count=call["count"] - half)
    given = block_sparse_attention(**{**call, "count": half}, backend="reference")
    check_rounded(call, *merge_attention(*zip(first, second, strict=True)))
    mixed = merge_attention(*zip(given, second, strict=True))  # a branch in lower precision beside one as given
    torch.testing.assert_close(mixed[0], whole[0], atol=5e-2, rtol=0)
    torch.testing.assert_close(mixed[1], whole[1], atol=5e-2, rtol=0)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("case", ["lengths-differ", "orders", "dim-16"])
def test_every_way_to_load_matches_gold(case, tma, device):
    from test_block_sparse import problem_of

    from dit_accel.kernels.block_sparse.quantised_triton import attend
    from dit_accel.kernels.block_sparse.tiles import Tile

    call = make_call(**{**CASES[case], "block_q": 64, "dtype": HALF}, device=device)
    check_rounded(call, *attend(problem_of(call), Tile(32, 32, 4, 2, tma=tma)))


# --- the checker itself: each of these mistakes must be caught ---


def steps_of_the_next_block(patch):
    right = quantised.quantised_keys

    def swapped(problem, mean):
        blocks = right(problem, mean).split(problem.block_k, 1)
        steps = [block.abs().amax((1, 3), keepdim=True) for block in blocks]
        return torch.cat([x * steps[i - 1] / steps[i] for i, x in enumerate(blocks)], 1)

    patch.setattr(quantised, "quantised_keys", swapped)


def steps_of_the_next_query(patch):
    right = quantised._quantised_queries

    def swapped(q):
        step = q.abs().amax(-1, keepdim=True)
        return right(q) * step.roll(1, 1) / step

    patch.setattr(quantised, "_quantised_queries", swapped)


def mean_not_put_back(patch):
    right = quantised.rounded_problem
    patch.setattr(quantised, "rounded_problem", lambda problem: (right(problem)[0], torch.zeros(())))


def mean_put_back_unscaled(patch):
    right = quantised.rounded_problem

    def unscaled(problem):
        new, lost = right(problem)
        return new, lost / problem.scale

    patch.setattr(quantised, "rounded_problem", unscaled)


def mean_not_taken(patch):
    patch.setattr(quantised, "key_mean", lambda k: k.new_zeros(k.shape[0], *k.shape[2:]).float())


def mean_of_another_head(patch):
    right = quantised.key_mean
    patch.setattr(quantised, "key_mean", lambda k: right(k).roll(1, 1))


def seven_bits(patch):
    patch.setattr(quantised, "LEVELS", 63)


def rounded_down(patch):
    right = torch.floor
    patch.setattr(quantised.torch, "floor", lambda x: right(x - 0.5))


@pytest.mark.parametrize(
    "mistake",
    [
        steps_of_the_next_block, steps_of_the_next_query, mean_not_put_back, mean_put_back_unscaled, mean_not_taken,
        mean_of_another_head, seven_bits, rounded_down,
    ],
)  # fmt: skip
def test_the_checker_catches(mistake, monkeypatch):
    call = make_call(q_len=90, block_q=32, block_k=32, dtype=FP32, seed=3)
    call["k"] += torch.tensor([2.0, -1.0])[:, None]
    check_rounded(call, *run(call, "reference"))
    with monkeypatch.context() as patch:
        mistake(patch)
        result = run(call, "reference")
    with pytest.raises(AssertionError):
        check_rounded(call, *result)


@pytest.mark.parametrize("mistake", ["step", "mean"])
def test_the_checker_catches_mistakes_of_the_kernel(mistake, monkeypatch, device):
    """Steps of another block, and a mean that was taken and is not put back."""
    from dit_accel.kernels.block_sparse import quantised_triton

    call = make_call(q_len=64, block_q=32, block_k=32, density=1.1, dtype=HALF, device=device)
    call["k"][:, 32:] *= 1.5
    call["k"] += 2.0
    check_rounded(call, *run(call, "triton"))
    right = quantised_triton.pack

    def wrong(problem):
        made = right(problem)
        return replace(made, **({"step": made.step.roll(1, 2)} if mistake == "step" else {"mean": 0 * made.mean}))

    monkeypatch.setattr(quantised_triton, "pack", wrong)
    with pytest.raises(AssertionError):
        check_rounded(call, *run(call, "triton"))


# --- the door ---


def test_precision_is_carried_out_or_refused():
    call = make_call(q_len=64)
    with pytest.raises(ValueError, match="precision is 'int4'; known are 'as given', 'int8'"):
        block_sparse_attention(**call, precision="int4")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run .* not fp16 or bf16, which precision 'int8'"):
        run(call, "triton")
    reasons = unsupported_reasons("triton", device=torch.device("cpu"), dtype=FP32, head_dim=300, precision="int8")
    assert [r for r in reasons if "head dim 300" in r]
    out, _ = run({**call, **{n: call[n].double() for n in "qkv"}}, "reference")
    assert out.dtype == torch.float64
