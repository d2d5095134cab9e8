"""torch.compile: no graph break, no recompile between steps, eager's result, stock where dense, no trace left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from test_hosts import FULL, SPARSE
from torch._dynamo.utils import counters

import dit_accel
from dit_accel import compiled
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.kernels.block_lists.op import lists_op
from dit_accel.kernels.block_mass.op import mass_op as block_mass_op
from dit_accel.kernels.block_max.op import max_op
from dit_accel.kernels.block_sparse.op import block_sparse_op
from dit_accel.kernels.budget.op import heads_op, rows_op
from dit_accel.kernels.descent.op import descend_op
from dit_accel.kernels.merge.op import merge_op
from dit_accel.kernels.pooled.op import pooled_op
from dit_accel.kernels.qk_norm_rope.op import norm_rope_op
from dit_accel.kernels.row_shares.op import keys_op, units_op
from dit_accel.kernels.top_mass.op import mass_op
from dit_accel.kernels.unit_error.op import error_op
from dit_accel.sparsity.recipes import resolve

STEPS = 4
RECIPE = SPARSE.override(dense_steps=0.25)  # one dense step, then plans decided anew at every step
NEW_GRAPHS = {"flux": 2, "wan": 1}  # kinds of blocks, however many layers


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def compile_it(pipe: Any, how: str, backend: str = "aot_eager") -> None:
    if how == "regional":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    elif how == "whole":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)
    else:
        pipe.transformer.compile(fullgraph=True, backend=backend)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def generate(pipe: Any, call: dict[str, Any], **changes: Any) -> torch.Tensor:
    """Run a pipeline; from the second step on any recompile is an error."""

    def strict(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            torch.compiler.set_stance("fail_on_recompile")
        return values

    try:
        return tiny.generate(pipe, call, steps=STEPS, callback_on_step_end=strict, **changes)
    finally:
        torch.compiler.set_stance("default")


def check_like_eager(name: str, how: str, backend: str = "aot_eager", recipe: Recipe = RECIPE) -> int:
    """Hold a compiled pipeline against itself: accelerated, dense, restored, accelerated again; return new graphs."""
    rounding, exactly = {"rtol": 1e-4, "atol": 1e-4}, {"rtol": 0, "atol": 0}
    like_stock = exactly if backend == "aot_eager" else rounding
    like_eager = rounding if name == "hunyuan_video" else like_stock  # eager code projects no padding: other shapes
    pipe, call = tiny.FAMILIES[name]()
    with dit_accel.accelerate(pipe, recipe) as handle:
        eager, expected = tiny.generate(pipe, call, steps=STEPS), handle.report()
    compile_it(pipe, how, backend)
    stock = generate(pipe, call)
    before = graphs()
    with dit_accel.accelerate(pipe, recipe) as handle:
        ours, report = generate(pipe, call), handle.report()
        added = graphs() - before
    torch.testing.assert_close(ours, eager, **like_eager)
    assert not torch.equal(ours, stock)
    assert report.rows == expected.rows
    assert report.sparse_calls == report.calls * (STEPS - 1) // STEPS
    torch.compiler.set_stance("fail_on_recompile")  # from here on everything has been compiled
    assert torch.equal(tiny.generate(pipe, call, steps=STEPS), stock)
    with dit_accel.accelerate(pipe, recipe, density=1):
        torch.testing.assert_close(tiny.generate(pipe, call, steps=STEPS), stock, **like_stock)
    with dit_accel.accelerate(pipe, recipe):
        assert torch.equal(tiny.generate(pipe, call, steps=STEPS), ours)
    return added


@pytest.mark.parametrize("how", ["regional", "whole"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_compiled_is_eager(name: str, how: str) -> None:
    assert check_like_eager(name, how) == (NEW_GRAPHS[name] if how == "regional" else 1)


@pytest.mark.parametrize(("name", "how"), [("flux", "whole"), ("wan", "regional")])
def test_a_preset_compiled_is_eager(name: str, how: str) -> None:
    """It decides once, keeps that, and corrects by means in a branch of its own."""
    preset = resolve("balanced", density=0.4, dense_steps=0.25, block_q=64, block_k=64, key_run=16)
    assert check_like_eager(name, how, recipe=preset) == 1


@pytest.mark.full
@pytest.mark.parametrize("how", ["regional", "whole", "in place"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_compiled_is_eager_in_all_families(name: str, how: str) -> None:
    pipe, _ = tiny.FAMILIES[name]()
    if how == "regional" and not getattr(pipe.transformer, "_repeated_blocks", None):
        how = "whole"  # diffusers knows no repeated blocks of this model
    check_like_eager(name, how)


@pytest.mark.full
@pytest.mark.parametrize("how", ["regional", "whole"])
@pytest.mark.parametrize("name", ["flux", "wan", "hunyuan_video", "ltx"])
def test_inductor_is_eager_within_rounding(name: str, how: str) -> None:
    check_like_eager(name, how, "inductor")


def test_a_processor_of_another_family_is_traced_through() -> None:
    check_like_eager("ltx", "regional")


def test_padded_text_is_left_out() -> None:
    pipe, call = tiny.hunyuan_video()
    stock = tiny.generate(pipe, call, steps=STEPS)
    compile_it(pipe, "in place")
    with dit_accel.accelerate(pipe, FULL) as handle:
        torch.testing.assert_close(generate(pipe, call), stock, rtol=1e-4, atol=1e-4)
        assert generate(pipe, {**call, "prompt": "a red taco"}).isfinite().all()  # another length of the text
        assert handle.report().layout.endswith("4 text + 12 pad")
        assert handle.report().sparse_calls == handle.report().calls


def test_sizes() -> None:
    """The second size compiles once more, for all sizes to come; where forbidden it shows, so tests can fail."""
    pipe, call = tiny.wan()
    compile_it(pipe, "regional")
    sizes = [{"height": h, "width": w} for h, w in ((80, 48), (48, 64), (112, 32))]
    with dit_accel.accelerate(pipe, RECIPE) as handle:
        generate(pipe, call, **sizes[0])
        torch.compiler.set_stance("fail_on_recompile")
        with pytest.raises(RuntimeError, match="recompile"):
            tiny.generate(pipe, call, **sizes[1])
        torch.compiler.set_stance("default")
        ours = [generate(pipe, call, **sizes[1])]
        assert graphs() == 2
        ours.append(generate(pipe, call, **sizes[2]))
        assert graphs() == 2
        assert handle.report().layout == "3x7x2"
    pipe, call = tiny.wan()
    with dit_accel.accelerate(pipe, RECIPE):
        for size, compiled_result in zip(sizes[1:], ours, strict=True):
            assert torch.equal(tiny.generate(pipe, call, steps=STEPS, **size), compiled_result)


def test_stages_get_unrotated_tokens() -> None:
    pipe, call = tiny.wan()
    seen: list[AttentionCall] = []

    def watch(attention: AttentionCall) -> AttentionCall:
        seen.append(attention)
        return attention

    with dit_accel.accelerate(pipe, RECIPE) as handle:
        compile_it(pipe, "regional")
        plain = generate(pipe, call)
        handle.stages = (watch,)
        assert torch.equal(generate(pipe, call), plain)
        assert graphs() == 2
        handle.stages = ()
        generate(pipe, call)
        assert graphs() == 2
    assert len(seen) == handle.report().sparse_calls
    for attention in seen:
        assert attention.rotate is not None
        assert attention.q_raw is not None
        assert not torch.equal(attention.q_raw, attention.q)
        torch.testing.assert_close(attention.rotate(attention.q_raw), attention.q, rtol=0, atol=0)


def test_compiled_while_accelerated_then_restored() -> None:
    pipe, call = tiny.wan()
    stock = tiny.generate(pipe, call, steps=STEPS)
    handle = dit_accel.accelerate(pipe, RECIPE, every=2)
    compile_it(pipe, "whole")
    assert not torch.equal(generate(pipe, call), stock)
    assert handle.report().state_bytes > 0
    held = [weakref.ref(attachment) for attachment in handle._attachments]
    held += [weakref.ref(seat) for attachment in handle._attachments for seat in attachment._seats]
    handle.restore()
    del handle
    gc.collect()
    assert len(held) == 5  # with the stand-ins of two self- and two cross-attentions
    assert all(ref() is None for ref in held)
    assert torch.equal(generate(pipe, call), stock)


def wan_call() -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 16, 3, 10, 6),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
    }


def test_gradients_stay_stock() -> None:
    model, call = tiny.wan_transformer(), wan_call()
    model(**call).sample.sum().backward()
    stock = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with dit_accel.accelerate(model, SPARSE) as handle:
        for index in range(2):
            handle.step(index, 2)
            model.zero_grad()
            model(**call).sample.sum().backward()
        report = handle.report()
    assert [(row.kind, row.calls, row.reason) for row in report.rows] == [("dense", 4, "gradients are asked for")]
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], stock)


@torch.no_grad()
def test_a_stand_in_that_someone_kept_is_stock_after_restore() -> None:
    model, call = tiny.wan_transformer(), wan_call()
    stock = model(**call).sample
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    handle = dit_accel.accelerate(model, SPARSE)
    handle.step(0, 1)
    assert not torch.equal(model(**call).sample, stock)
    kept = dict(model.attn_processors)
    handle.restore()
    model.set_attn_processor(kept)
    assert torch.equal(model(**call).sample, stock)
    assert handle.report().calls == 2


# --- the operations alone --------------------------------------------------------------------------------------------
@torch.no_grad()
def test_opcheck_of_attend_and_sdpa() -> None:
    for build, operation in ((tiny.flux, compiled.attend), (tiny.ltx, compiled.sdpa)):
        pipe, call = build()
        seen = []

        def watch(attention: AttentionCall, seen: list[AttentionCall] = seen) -> AttentionCall:
            seen.append(attention)
            return attention

        with dit_accel.accelerate(pipe, SPARSE) as handle:
            handle.stages = (watch,)
            tiny.generate(pipe, call, steps=1)
            one, handle.stages = seen[0], ()
            attachment = handle._attachments[0]
            attachment.step, attachment.layout, attachment._layout_reason = one.step, one.layout, ""
            number = one.site.module.processor._dit_accel_seat.number
            if operation is compiled.attend:
                torch.library.opcheck(operation, (number, one.q, one.k, one.v, None, []))
                torch.library.opcheck(operation, (number, one.q, one.k, one.v, None, [one.q, one.k]))
            else:
                qkv = [x.transpose(1, 2) for x in (one.q, one.k, one.v)]
                torch.library.opcheck(operation, (number, *qkv), {"scale": 0.3})
                mask = torch.zeros(1, 1, 1, qkv[1].shape[2]).expand(qkv[0].shape[0], -1, -1, -1)
                torch.library.opcheck(operation, (number, *qkv, mask))


def lists(length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = -(-length // block)
    index = torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()
    return index, torch.full((1, 1, blocks), blocks - 1, dtype=torch.int32)


@torch.no_grad()
def test_opcheck_of_the_kernels() -> None:
    q, k, v = torch.randn(3, 2, 37, 3, 16)
    index, count = lists(37, 16)
    bias, coords = torch.randn(2, 1, 37), torch.arange(37, dtype=torch.int32).expand(3, 37).contiguous()
    order = torch.randperm(48).int().masked_fill(torch.randperm(48) >= 48, -1)
    order = torch.where(order < 37, order, -1)[None, None]
    rest = (None, None, None, None, False, "", [0, 0, 0], None, None, None, False, True, "as given", None)
    torch.library.opcheck(block_sparse_op, (q, k, v, index, count, 16, 16, *rest))
    how = (False, False, "int8", "reference")
    full = (count - 1, order, order, bias, False, "band", [5, 0, 0], coords, coords, 0.5, *how)
    torch.library.opcheck(block_sparse_op, (q, k, v, index, count, 16, 16, *full))
    outs, lses = list(torch.randn(2, 2, 37, 3, 16)), list(torch.randn(2, 2, 3, 37))
    torch.library.opcheck(merge_op, (outs, lses, None))
    owner, tokens = torch.arange(5).view(1, 1, 5), torch.full((1, 1, 5), 16)
    units = torch.rand(2, 3, 5, 5) < 0.5
    torch.library.opcheck(lists_op, (units, owner, owner, tokens, tokens, 16, None))
    score, keep, cost = torch.randn(2, 3, 5, 7), torch.eye(5, 7, dtype=torch.bool), torch.ones(7)
    torch.library.opcheck(rows_op, (score, keep, cost, 0.3, None, None))
    torch.library.opcheck(rows_op, (score, keep, cost, 0.0, torch.full((2, 1, 5, 1), 3.0), "reference"))
    torch.library.opcheck(heads_op, (score, keep, torch.ones(5), cost, 0.3, None))
    torch.library.opcheck(mass_op, (score, keep, 0.5, 0.25, None, None))
    slots = torch.arange(48, dtype=torch.int32)
    torch.library.opcheck(block_mass_op, (q[:, :32], k[:, :32], slots[:32], slots[:32], 16, 0.2, None, None))
    table, weight = torch.randn(2, 40, 16), torch.ones(16)
    joint = ([q, q[:, :5]], [k, k[:, :5]], [weight, weight, None, None, None, weight, weight, None])
    torch.library.opcheck(norm_rope_op, (*joint, "rms", 1e-6, False, True, table[0], table[1], 2, True, None))
    torch.library.opcheck(norm_rope_op, ([q], [k], [None] * 4, "layer", 1e-6, True, False, None, None, 0, True, None))
    groups = (torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), torch.ones(1, 1, 5), torch.zeros(1, 1, 4, 5).bool())
    torch.library.opcheck(pooled_op, (q, *groups, torch.zeros(1, 1, 37, dtype=torch.int64), 0.2, 0, None, None, None))
    into = (torch.randn_like(q), torch.randn(2, 3, 37))
    torch.library.opcheck(pooled_op, (q, *groups, torch.zeros(1, 1, 37, dtype=torch.int64), 0.2, 0, *into, None))
    logits = torch.randn(1, 2, 3, 32)
    torch.library.opcheck(units_op, (logits, slots[:32], 8, 0.2, torch.randn(1, 1, 32), None))
    torch.library.opcheck(units_op, (logits, None, 8, 0.2, None, None))
    units = (slots[None, None, :32], torch.tensor([[[0, 16, 32]]]), 16, torch.randn(2, 3, 2, 16))
    torch.library.opcheck(error_op, (torch.randn(2, 3, 4, 16), k, v, *units, 0.2, None))
    torch.library.opcheck(descend_op, (q[:, :32, None].transpose(1, 3), k[:, :32], slots[:32], 16, None))
    torch.library.opcheck(keys_op, (logits, 0.2, None, None))
    torch.library.opcheck(max_op, (q[:, :32], k[:, :32], slots[:32], slots[:32], 16, 0.2, None, None, None))


@torch.no_grad()
def test_kernels_in_compiled_code() -> None:
    from dit_accel.kernels.block_sparse import Predicate, block_sparse_attention
    from dit_accel.kernels.merge import merge_attention
    from dit_accel.kernels.qk_norm_rope import Norm, Part, qk_norm_rope

    coords = torch.arange(48, dtype=torch.int32).expand(3, 48).contiguous()

    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        index, count = lists(48, 16)
        q, k = qk_norm_rope([Part(q, k)], Norm("layer", across_heads=True), table, table)
        near = Predicate("band", (3, 0, 0), coords, coords)
        first = block_sparse_attention(q, k, v, index, count, block_q=16, block_k=16, full_count=count)
        second = block_sparse_attention(q, k, v, index, count, block_q=16, block_k=16, predicate=near, scale=0.2)
        return merge_attention([first[0], second[0]], [first[1], second[1]])[0]

    table = torch.randn(48, 8)
    qkv = torch.randn(3, 2, 48, 3, 16)
    fast = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(*qkv), both(*qkv), rtol=0, atol=0)
