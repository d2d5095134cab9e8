"""The kernel for compute capability 9.0: which calls it takes, and on such a GPU the same truth as for all back ends.

Gluon has no interpreter; that it compiles is in test_aot.py. On such a GPU the door takes it by itself, so that all of
test_block_sparse.py and test_quantised.py hold there too.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import BF16, FP32, HALF
from attention_gold import check, make_call
from quantised_gold import check_rounded

from dit_accel.kernels.block_sparse.api import _checked

hopper = pytest.importorskip("dit_accel.kernels.block_sparse.hopper", reason="this Triton has no Gluon of that kind")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
NAMES = ("full_count", "q_order", "k_order", "key_bias", "predicate", "scale")


def problem_of(call, precision="as given"):
    first = [call[n] for n in ("q", "k", "v", "index", "count", "block_q", "block_k")]
    return replace(_checked(*first, *(call.get(n) for n in NAMES)), precision=precision)


@pytest.mark.parametrize(
    ("case", "lack"),
    [
        ({}, None),
        ({"block_q": 128, "block_k": 128, "dim": 128}, None),
        ({"key_heads": 1}, None),
        ({"orders": True, "full": True, "list_heads": 2, "holes": 5}, None),
        ({"orders": True, "holes": 5}, "which blocks are full"),
        ({"dtype": FP32}, "dtype torch.float32"),
        ({"dim": 32}, "head dim 32"),
        ({"dim": 256}, "head dim 256"),
        ({"dim": 44}, "head dim 44"),
        ({"block_q": 32}, "blocks of 32 queries"),
        ({"block_k": 48}, "blocks of 48 keys"),
        ({"bias": "finite"}, "bias"),
        ({"predicate": "box"}, "predicate"),
        ({"orders": True, "full": True, "list_heads": 2, "key_heads": 1}, "may not be packed"),
    ],
)
def test_what_it_lacks_is_named(case, lack):
    found = hopper.misfits(problem_of(make_call(**{"dtype": BF16, **case})))
    assert (found == []) if lack is None else any(lack in reason for reason in found)


def case_of(seed, key_blocks=(16, 32, 64, 128)):
    draw = random.Random(seed)
    case = {
        "seed": seed,
        "dtype": draw.choice([HALF, BF16]),
        "batch": draw.choice([1, 2]),
        "q_len": draw.randint(1, 700),
        "k_len": draw.randint(1, 700),
        "dim": draw.choice([40, 64, 72, 96, 128]),
        "block_q": draw.choice([64, 128]),
        "block_k": draw.choice(key_blocks),
        "density": draw.random() * 1.2,
        "orders": draw.random() < 0.6,
        "full": True,
        "heads": draw.choice([1, 2, 4]),
    }
    case["key_heads"] = draw.choice([n for n in (1, 2, 4) if case["heads"] % n == 0])
    case["list_heads"] = draw.choice([1, case["heads"]])
    case["list_batch"] = draw.choice([1, case["batch"]])
    case["holes"] = draw.choice([0, 17, 200]) if case["orders"] else 0
    if case["orders"] and case["list_heads"] > 1:
        case["key_heads"] = case["heads"]
    return case


@on_hopper
@pytest.mark.parametrize("seed", range(100))
def test_random_calls(seed):
    case = case_of(seed)
    print(case)
    call = make_call(**case, device="cuda")
    problem = problem_of(call)
    assert hopper.takes(problem)
    check(call, *hopper.attend(problem))


@on_hopper
@pytest.mark.parametrize("seed", range(100, 140))
def test_random_calls_in_int8(seed):
    case = case_of(seed, (64, 128))
    print(case)
    call = make_call(**case, device="cuda")
    problem = problem_of(call, "int8")
    assert hopper.takes(problem)
    check_rounded(call, *hopper.attend(problem))


@on_hopper
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [64, 128])
def test_repeats_are_equal_bit_for_bit(block_q, block_k):
    """Many programs and lists of very different length, so that warps meet in every order."""
    call = make_call(
        q_len=3000, heads=4, dim=128, dtype=BF16, block_q=block_q, block_k=block_k, list_heads=4, device="cuda"
    )
    call["count"] = (call["count"] * torch.rand(call["count"].shape, device="cuda") ** 2).int()
    problem = problem_of(call)
    first = hopper.attend(problem)
    for _ in range(250):
        again = hopper.attend(problem)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
