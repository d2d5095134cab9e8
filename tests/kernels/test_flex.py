"""FlexAttention as a back end: the same table, its lists, and when it is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import CASES, random_case
from attention_gold import check, make_call, pair_mask
from test_block_sparse import problem_of

from dit_accel.backend import kernel_name
from dit_accel.kernels.block_sparse import automatic, block_sparse_attention, flex, unsupported_reasons

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
KEPT = ["dim-40", "grouped-heads", "list-per-sample", "box-orders-holes-bias"]
BLOCKS = {"block_q": 64, "block_k": 64}


@pytest.mark.parametrize("case", KEPT)
def test_matches_gold(case, device):
    call = make_call(**CASES[case], device=device)
    check(call, *block_sparse_attention(**call, backend="flex"))


@pytest.mark.full
@pytest.mark.parametrize("case", sorted(set(CASES) - set(KEPT)))
def test_the_rest_of_the_table_matches_gold(case, device):
    test_matches_gold(case, device)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_random_sweep(seed, device):
    case = random_case(seed)
    print(case)
    call = make_call(**case, device=device)
    check(call, *block_sparse_attention(**call, backend="flex"))


@pytest.mark.parametrize("seed", range(5))
def test_lists_and_mask_say_the_same(seed):
    """Uncompiled FlexAttention asks the mask alone; compiled, the mask in partial blocks and nothing in full ones."""
    call = {name: x for name, x in make_call(**random_case(seed)).items() if name != "key_bias"}
    heads = call["q"].shape[2]
    rows, cols = (flex._tokens(call.get(f"{n}_order"), call[f"block_{n}"], call[n], heads) for n in "qk")
    made = flex._block_mask(problem_of(call), rows, cols, flex._listed(problem_of(call), cols.shape[2]))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (*rows.shape, cols.shape[2])), indexing="ij")
    asked = made.mask_mod(b, h, i, j)
    block = b, h, i // call["block_q"], j // call["block_k"]
    partial, full = (
        block_table(count, index).expand(*rows.shape[:2], -1, -1)[block]
        for count, index in (
            (made.kv_num_blocks, made.kv_indices),
            (made.full_kv_num_blocks, made.full_kv_indices),
        )
    )
    gold = torch.nn.functional.pad(pair_mask(call), (0, 1, 0, 1))  # holes are the last row and column
    gold = gold[b, h, rows[..., None], cols[:, :, None]]
    real = (rows >= 0)[..., None]
    assert torch.equal((full | (partial & asked)) & real, gold)
    assert torch.equal(asked & real, gold)


def block_table(count, index):
    """Which key blocks are among the first `count` of a list, bool [B|1, H|1, Nq, Nk]."""
    used = torch.arange(index.shape[3]) < count[..., None]
    return torch.zeros(index.shape, dtype=torch.bool).scatter_(3, index.long(), used)


@pytest.mark.parametrize("case", [{"orders": True, "holes": 30}, {"bias": "inf"}])
def test_holes_and_masked_keys_do_not_leak(case, device):
    call = make_call(**case, device=device)
    if "k_order" in call:
        call["k_order"][..., 3:9] = -1
    unseen = (~pair_mask(call).any(2)).all(1)
    assert unseen.any()
    clean = block_sparse_attention(**call, backend="flex")
    for name in ("k", "v"):
        call[name][unseen.to(device)] = math.nan
    assert all(torch.equal(*both) for both in zip(clean, block_sparse_attention(**call, backend="flex"), strict=True))


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the whole table is compiled")
@pytest.mark.parametrize("case", ["length-129", "orders-holes", "box-orders-holes-bias"])
def test_compiled_for_the_lists(case, monkeypatch):
    """What is compiled skips blocks; on a CPU it gives no log-sum-exp, which comes from the uncompiled call here."""
    eager = flex.flex_attention
    compiled = torch.compile(eager, dynamic=False, fullgraph=True)

    def both(*operands, return_aux, **options):
        return compiled(*operands), eager(*operands, return_aux=return_aux)[1]

    monkeypatch.setattr(flex, "flex_attention", both)
    for seed in range(2):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            call = make_call(**{**CASES[case], **BLOCKS, "seed": seed})
            check(call, *block_sparse_attention(**call, backend="flex"))


def test_it_is_chosen_where_our_kernels_do_not_run(monkeypatch):
    assert automatic(torch.device("cpu")) == ("cpu", "reference")
    assert automatic(torch.device("xpu")) == ("triton", "flex", "reference")
    for capability, expected in (((7, 5), ("triton", "flex", "reference")), ((8, 0), ("triton", "reference"))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert automatic(torch.device("cuda")) == expected
    assert automatic(torch.device("xpu"), "int8") == ("triton",)
    monkeypatch.setattr("dit_accel.kernels.block_sparse.triton.runs_on", lambda device, dtype: ["not here"])
    assert kernel_name(torch.device("xpu"), torch.bfloat16, 64) == ("flex", "not here")
    assert kernel_name(torch.device("xpu", 1), torch.float64, 64)[0] == "reference"
    assert unsupported_reasons("flex", device=torch.device("mps"), dtype=torch.float64, head_dim=64) == [
        "FlexAttention does not run on mps",
        "dtype torch.float64 is not fp16, bf16 or fp32",
    ]
