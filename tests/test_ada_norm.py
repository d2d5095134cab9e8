"""Adaptive layer norms in one pass where the block's attention is sparse, and stock's own everywhere else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, CogVideoXLayerNormZero
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from test_hosts import FULL

import dit_accel
from dit_accel.hosts import ada_norm
from dit_accel.kernels.choice import prefer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = (AdaLayerNormZero, AdaLayerNormZeroSingle, CogVideoXLayerNormZero)
FAMILIES = ["flux", "hunyuan_video", "cogvideox_rotary", "sd3"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[torch.Size]:
    """Let hosts take the one pass on any device, and write down what went through it.

    The operation runs in torch, because Triton's interpreter takes seconds; a parameter "triton" runs it there.
    """
    seen: list[torch.Size] = []
    operation = ada_norm.ada_norm

    def count(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x.shape)
        return operation(x, *args, backend=getattr(request, "param", "reference"))

    monkeypatch.setattr(ada_norm, "wants_triton", lambda x: True)
    monkeypatch.setattr(ada_norm, "unsupported_reasons", lambda *_: [])
    monkeypatch.setattr(ada_norm, "ada_norm", count)
    return seen


def built(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = tiny.FAMILIES[name]()
    pipe.to(DEVICE)
    return pipe, {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in call.items()}


def norms(pipe: Any) -> list[torch.nn.Module]:
    return [module for module in pipe.transformer.modules() if isinstance(module, NORMS)]


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_of_sparse_blocks_take_the_one_pass(name: str, passes: list[torch.Size]) -> None:
    """As many as stock calls, none of them in dense steps; the pictures are those of the modules' own forward."""
    pipe, call = built(name)
    with dit_accel.accelerate(pipe, FULL) as handle:
        fused = tiny.generate(pipe, call, steps=2)
        report = handle.report()
        assert report.sparse_calls == report.calls
        count = len(passes)
        assert count > 0
        with prefer("reference"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ada_norm, "wants_triton", lambda x: False)
            apart = tiny.generate(pipe, call, steps=2)
    assert len(passes) == count
    torch.testing.assert_close(fused, apart, rtol=1e-4, atol=1e-4)
    with dit_accel.accelerate(pipe, FULL, dense_steps=0.5):
        tiny.generate(pipe, call, steps=2)
        assert len(passes) == count + count // 2


@pytest.mark.full
@pytest.mark.parametrize("passes", ["triton"], indirect=True)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_gives_the_same_pictures(name: str, passes: list[torch.Size]) -> None:
    test_norms_of_sparse_blocks_take_the_one_pass(name, passes)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_steps_are_stock_bit_for_bit(name: str, passes: list[torch.Size]) -> None:
    pipe, call = built(name)
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, FULL, dense_steps=1.0):
        assert torch.equal(tiny.generate(pipe, call), stock)
    assert not passes


def test_undone_exactly_and_the_users_own_stays(passes: list[torch.Size]) -> None:
    pipe, call = tiny.flux()
    before, stock = norms(pipe), tiny.generate(pipe, call)
    names = list(pipe.transformer.state_dict())
    handle = dit_accel.accelerate(pipe, FULL)
    during = norms(pipe)
    assert not any(a is b for a, b in zip(before, during, strict=True))
    assert list(pipe.transformer.state_dict()) == names
    block = pipe.transformer.transformer_blocks[0]
    mine = AdaLayerNormZero(block.norm1.linear.in_features)
    mine.load_state_dict(block.norm1.state_dict())
    block.norm1 = mine
    handle.restore()
    assert block.norm1 is mine
    after = norms(pipe)
    assert [a is b for a, b in zip(before, after, strict=True)].count(False) == 1
    assert torch.equal(tiny.generate(pipe, call), stock)
    passes.clear()
    emb = torch.randn(1, mine.linear.in_features)
    kept = next(norm for norm in during if type(norm).__name__ == "AdaLayerNormZeroSingle")  # by someone, all along
    twin = next(norm for norm in before if norm.linear is kept.linear)
    x = torch.randn(1, 3, mine.linear.in_features)
    assert all(torch.equal(a, b) for a, b in zip(kept(x, emb=emb), twin(x, emb=emb), strict=True))
    assert not passes


def test_copies_and_pickles_are_stock_modules() -> None:
    pipe, _ = tiny.flux()
    with dit_accel.accelerate(pipe, FULL):
        stand_in = pipe.transformer.transformer_blocks[0].norm1
        for copied in (copy.copy(stand_in), copy.deepcopy(stand_in), pickle.loads(pickle.dumps(stand_in))):
            assert type(copied) is AdaLayerNormZero
            assert torch.equal(copied.linear.weight, stand_in.linear.weight)
        processor = pipe.transformer.transformer_blocks[0].attn.processor
        for copied in (copy.copy(processor), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
            assert type(copied) is FluxAttnProcessor
        whole = copy.deepcopy(pipe.transformer)
    assert all(type(module) in NORMS for module in whole.modules() if isinstance(module, NORMS))


def test_hooks_adapters_and_moves_after_attaching_count(passes: list[torch.Size]) -> None:
    """What is set on a stand-in is set on the module, and outlives the acceleration."""
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, FULL):
        norm = pipe.transformer.transformer_blocks[0].norm1
        plain = tiny.generate(pipe, call)
        seen: list[int] = []
        hook = norm.register_forward_hook(lambda *_: seen.append(1))
        norm.linear = torch.nn.Linear(norm.linear.in_features, norm.linear.out_features)
        assert not torch.equal(tiny.generate(pipe, call), plain)
        assert seen
        pipe.to(torch.bfloat16)
        assert norm.linear.weight.dtype == torch.bfloat16
    real = pipe.transformer.transformer_blocks[0].norm1
    assert real.linear is norm.linear
    assert real._forward_hooks
    hook.remove()
    assert not real._forward_hooks


def test_offloading_hooks_set_meanwhile_survive_the_restore() -> None:
    """As accelerate's `add_hook_to_module` does: an instance's forward that calls the one it found."""
    pipe, call = tiny.flux()
    stock = tiny.generate(pipe, call)
    handle = dit_accel.accelerate(pipe, FULL)
    norm = pipe.transformer.transformer_blocks[0].norm1
    found, calls = norm.forward, []
    norm.forward = lambda *args, **kwargs: (calls.append(1), found(*args, **kwargs))[1]
    handle.restore()
    assert torch.equal(tiny.generate(pipe, call), stock)
    assert calls


CHANGES: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "a hook": lambda norm: (norm.register_forward_hook(lambda module, args, output: output + 1), norm)[1],
    "another class": lambda norm: torch.nn.RMSNorm(24, eps=1e-6),
    "a trained weight": lambda norm: torch.nn.LayerNorm(24),
    "another dtype": lambda norm: torch.nn.LayerNorm(24, elementwise_affine=True).double().requires_grad_(False),
}


def test_an_unknown_norm_is_run_itself(passes: list[torch.Size]) -> None:
    x, scale, shift = torch.randn(2, 5, 24), torch.randn(2, 24), torch.randn(2, 24)
    norm = torch.nn.LayerNorm(24, elementwise_affine=False)
    expected = norm(x) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ada_norm.modulate(norm, x, scale, shift), expected)
    assert len(passes) == 1
    for change, make in CHANGES.items():
        other = make(torch.nn.LayerNorm(24, elementwise_affine=False))
        if change != "another dtype":
            expected = other(x) * (1 + scale[:, None]) + shift[:, None]
            assert torch.equal(ada_norm.modulate(other, x, scale, shift), expected), change
        assert not ada_norm._plain(other, x, scale, shift), change
    assert not ada_norm._plain(norm, x, scale.double(), shift)
    for shared in (scale[:1], scale[:, :1]):  # broadcast, as torch's operations would
        expected = norm(x) * (1 + shared[:, None]) + shift[:, None]
        assert torch.equal(ada_norm.modulate(norm, x, shared, shift), expected)
    with torch.autocast("cpu"):
        assert not ada_norm._plain(norm, x, scale, shift)
    assert len(passes) == 1


def test_labels_are_left_to_stock(passes: list[torch.Size]) -> None:
    """A module that embeds its timestep itself is not taken over."""
    module = AdaLayerNormZero(24, num_embeddings=3)
    x = torch.randn(1, 4, 24)
    assert ada_norm._zero(module, x, torch.tensor([3]), torch.tensor([1]), torch.float32) is None


def test_compiled_code_traces_the_modules(passes: list[torch.Size]) -> None:
    torch._dynamo.reset()
    pipe, call = tiny.flux()
    with dit_accel.accelerate(pipe, FULL):
        eager = tiny.generate(pipe, call)
        count = len(passes)
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tiny.generate(pipe, call), eager, rtol=1e-4, atol=1e-4)
    assert len(passes) == count > 0
    torch._dynamo.reset()
