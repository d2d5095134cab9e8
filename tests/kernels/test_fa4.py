"""flash-attn-4 as a back end: what it is handed, what it is refused.

Its kernels need a GPU; here a slow one stands in.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_gold import check, make_call

from dit_accel.kernels.block_sparse import block_sparse_attention, fa4, unsupported_reasons

WHOLE = {"block_q": 128, "block_k": 128, "q_len": 256, "k_len": 384, "dim": 64, "dtype": torch.bfloat16, "full": True}
CASES = [
    {},
    {"batch": 2, "heads": 4, "list_heads": 4},
    {"heads": 4, "key_heads": 2},
    {"dim": 128, "density": 0.3, "list_batch": 2, "batch": 2},
]


def slow(q, k, v, *, softmax_scale, block_sparse_tensors, return_lse):
    """What flash-attn-4 says of itself: full blocks by count and index [B, H, Nq, M], no partial ones."""
    assert return_lse
    lists, (rows, cols) = block_sparse_tensors, block_sparse_tensors.block_size
    assert not lists.mask_block_cnt.any()
    b, length, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    seen = torch.zeros(b, heads, length, k.shape[1], dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in lists.full_block_cnt.shape)).tolist():
        for block in lists.full_block_idx[tuple(at)][: int(lists.full_block_cnt[tuple(at)])].tolist():
            seen[at[0], at[1], at[2] * rows :][:rows, block * cols :][:, :cols] = True
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * softmax_scale
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype), logits.logsumexp(-1)


@pytest.fixture
def installed(monkeypatch):
    """A package of that name, and a CPU that passes for a GPU."""
    fields = ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx")
    modules = {name: ModuleType(f"flash_attn.cute.{name}") for name in ("block_sparsity", "interface")}
    modules["block_sparsity"].BlockSparseTensorsTorch = lambda *lists, block_size: SimpleNamespace(
        **dict(zip(fields, lists, strict=True)), block_size=block_size
    )
    modules["interface"].flash_attn_func = slow
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"flash_attn.cute.{name}", module)
    monkeypatch.setattr(fa4, "runs_on", lambda *_: [])


@pytest.mark.parametrize("case", CASES)
def test_matches_gold(case, installed):
    call = make_call(**{**WHOLE, **case})
    call["full_count"] = call["count"]
    check(call, *block_sparse_attention(**call, backend="fa4"))


def test_orders_are_gathered_before_and_scattered_after(installed):
    call = make_call(**{**WHOLE, "heads": 2, "list_heads": 2})
    for side, length in (("q", 256), ("k", 384)):
        call[f"{side}_order"] = torch.stack([torch.randperm(length) for _ in range(2)])[None].int()
    call["full_count"] = call["count"]
    check(call, *block_sparse_attention(**call, backend="fa4"))


@pytest.mark.parametrize(
    ("case", "lack"),
    [
        ({"block_k": 64}, "blocks of 128 x 64"),
        ({"bias": "finite"}, "key bias"),
        ({"predicate": "box"}, "predicate"),
        ({"orders": True, "holes": 5}, "may be partial"),
        ({"k_len": 300}, "no multiple"),
    ],
)
def test_what_it_lacks_is_named(case, lack, installed):
    call = make_call(**{**WHOLE, "full": False, **case})
    with pytest.raises(RuntimeError, match=lack):
        block_sparse_attention(**call, backend="fa4")


def test_it_is_never_automatic_and_asks_for_what_it_needs():
    reasons = unsupported_reasons("fa4", device=torch.device("cpu"), dtype=torch.float32, head_dim=40)
    assert [any(word in reason for reason in reasons) for word in ("cpu", "float32", "head dim 40")] == [True] * 3
