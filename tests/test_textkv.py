"""Kept text keys and values: stock bit for bit, reused as often as can be, never after anything has changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

import dit_accel
from dit_accel.call import Site
from dit_accel.origin import Origin, Unchanged
from dit_accel.step import StepInfo
from dit_accel.textkv import TextKV

WANS = ["wan", "wan_two_experts", "wan_per_token_time", "wan_image", "wan_image_per_token_time"]
STEPS, LAYERS, BRANCHES = 4, 2, 2


def dense(pipe: Any) -> dit_accel.Acceleration:
    """Accelerate so that nothing but the kept text could change a result."""
    return dit_accel.accelerate(pipe, "draft", density=1)


def counts(handle: dit_accel.Acceleration) -> tuple[int, int]:
    kept = handle._engine.text_kv
    return kept.computed, kept.reused


@pytest.mark.parametrize("name", WANS)
def test_reused_keys_give_stock_bit_for_bit(name: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    with dense(pipe) as handle:
        ours = tiny.generate(pipe, call, steps=STEPS)
        assert torch.equal(ours, tiny.generate(twin, call, steps=STEPS))
        experts = 2 if name == "wan_two_experts" else 1
        once = LAYERS * BRANCHES * experts
        assert counts(handle) == (once, LAYERS * BRANCHES * STEPS - once)


@pytest.mark.parametrize("name", ["wan", "wan_image"])
def test_without_guidance_and_with_two_samples(name: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    if "prompt" in call:
        call |= {"prompt": ["a cat", "red dance"], "negative_prompt": ["a", "the"]}
    else:
        call |= {key: call[key].repeat(2, 1, 1) * torch.tensor([1.0, 2.0])[:, None, None] for key in EMBEDS}
    call["guidance_scale"] = 1.0
    with dense(pipe) as handle:
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
        assert counts(handle) == (LAYERS, LAYERS)


EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


def edit_at_step_one(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    def edit(pipe: Any, step: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            values["prompt_embeds"] = change(pipe, values["prompt_embeds"])
        return values

    return {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


CHANGES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "written to": lambda _, text: text.mul_(2),
    "written to through a view": lambda _, text: (text[:, 1:3].add_(1), text)[1],
    "another tensor": lambda _, text: text * 2,
    "another tensor of the same values": lambda _, text: text.clone(),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_prompt_changed_in_the_middle_is_seen(kind: str) -> None:
    (pipe, call), (twin, _) = tiny.wan(), tiny.wan()
    edit = edit_at_step_one(CHANGES[kind])
    with dense(pipe) as handle:
        ours = tiny.generate(pipe, call, steps=STEPS, **edit)
        assert torch.equal(ours, tiny.generate(twin, call, steps=STEPS, **edit))
        assert counts(handle)[0] == LAYERS * BRANCHES + LAYERS  # the changed branch once more


WEIGHTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "to_k": lambda t: t.blocks[1].attn2.to_k.weight,
    "to_v": lambda t: t.blocks[0].attn2.to_v.bias,
    "norm_k": lambda t: t.blocks[0].attn2.norm_k.weight,
    "add_k_proj": lambda t: t.blocks[0].attn2.add_k_proj.weight,
    "norm_added_k": lambda t: t.blocks[0].attn2.norm_added_k.weight,
    "text embedder": lambda t: t.condition_embedder.text_embedder.linear_1.weight,
    "image embedder": lambda t: t.condition_embedder.image_embedder.norm1.bias,
}


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_changed_in_the_middle_are_seen(part: str) -> None:
    (pipe, call), (twin, _) = tiny.wan_image(), tiny.wan_image()

    def change(pipe: Any, text: torch.Tensor) -> torch.Tensor:
        WEIGHTS[part](pipe.transformer).add_(0.5)
        return text

    edit = edit_at_step_one(change)
    with dense(pipe) as handle:
        ours = tiny.generate(pipe, call, steps=STEPS, **edit)
        assert torch.equal(ours, tiny.generate(twin, call, steps=STEPS, **edit))
        assert counts(handle)[0] > LAYERS * BRANCHES


def test_new_prompt_in_a_new_run() -> None:
    (pipe, call), (twin, _) = tiny.wan(), tiny.wan()
    with dense(pipe) as handle:
        for prompt in ("a cat", "blue taco", "a cat"):
            changed = {**call, "prompt": prompt}
            assert torch.equal(tiny.generate(pipe, changed), tiny.generate(twin, changed))
            assert counts(handle)[0] == LAYERS * BRANCHES


@pytest.mark.parametrize("name", ["wan", "wan_image"])
def test_fused_projections(name: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    for target in (pipe, twin):
        target.transformer.fuse_qkv_projections()
    with dense(pipe) as handle:
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
        assert counts(handle) == (LAYERS * BRANCHES, LAYERS * BRANCHES)


def test_bytes_are_reported() -> None:
    pipe, call = tiny.wan_image()
    with dense(pipe) as handle:
        tiny.generate(pipe, call)
        picture, text, width = 5, 512, 32
        expected = LAYERS * BRANCHES * 2 * (picture + text) * width * 4
        report = handle.report()
        assert report.state_bytes == expected
        assert f"4 computed, 4 reused unchanged, {expected / 2**20:.1f} MiB held" in str(report)


def test_bytes_are_bounded() -> None:
    (pipe, call), (twin, _) = tiny.wan(), tiny.wan()
    with dense(pipe) as handle:
        kept = handle._engine.text_kv
        kept.limit = 2 * 2 * 16 * 24 * 4  # two sites' worth of four
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
        assert kept.nbytes == kept.limit
        assert counts(handle) == (6, 2)
        assert any("not kept: more than 0 MiB" in note for note in handle.report().notes)


def test_freed_by_the_next_run_and_by_restore() -> None:
    pipe, call = tiny.wan()
    handle = dense(pipe)
    held = []
    for prompt in ("a cat", "a dog"):
        tiny.generate(pipe, {**call, "prompt": prompt})
        held.append([weakref.ref(v) for kept in handle._engine.text_kv._kept.values() for v in kept.values])
        assert all(ref() is not None for ref in held[-1])
    gc.collect()
    assert all(ref() is None for ref in held[0])
    handle.restore()
    gc.collect()
    assert all(ref() is None for ref in held[1])
    assert handle.report().state_bytes == 0
    assert handle.report().notes == ("text keys and values: 4 computed, 4 reused unchanged",)


def hooked(pipe: Any) -> None:
    pipe.transformer.blocks[0].attn2.to_k.register_forward_hook(lambda module, args, out: out * 2)


def adapted(pipe: Any) -> None:
    class Adapter(torch.nn.Linear):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Adapter.scale += 1
            return super().forward(x) * self.scale

    for block in pipe.transformer.blocks:
        block.attn2.to_v.__class__ = Adapter


@pytest.mark.parametrize(("change", "reason"), [(hooked, "carries a hook"), (adapted, "Adapter is on the way")])
def test_modules_with_a_state_of_their_own_are_asked_each_time(change: Any, reason: str) -> None:
    (pipe, call), (twin, _) = tiny.wan(), tiny.wan()
    change(pipe)
    change(twin)
    with dense(pipe) as handle:
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
        assert any(reason in note for note in handle.report().notes)


def test_inference_mode_has_no_counter_of_writes_so_nothing_is_kept() -> None:
    (pipe, call), (twin, _) = tiny.wan_image(), tiny.wan_image()
    with dense(pipe) as handle, torch.inference_mode():
        call |= {key: call[key].clone() for key in EMBEDS}
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
        assert counts(handle)[1] == 0


def test_gradients_reach_the_text() -> None:
    model = tiny.wan_transformer()
    text = torch.randn(1, 6, 32, requires_grad=True)
    with dit_accel.accelerate(model, "draft", density=0.5) as handle:
        for index in range(2):
            handle.step(index, 2)
            model(torch.randn(1, 16, 1, 6, 6), torch.tensor([5.0]), text).sample.sum().backward()
        assert counts(handle) == (2 * LAYERS, 0)
        assert "text keys and values not kept: gradients are on" in handle.report().notes
    assert text.grad is not None


@torch.no_grad()
def test_own_loop_needs_steps_to_reuse() -> None:
    model, twin = tiny.wan_transformer().eval(), tiny.wan_transformer().eval()
    twin.load_state_dict(model.state_dict())
    call = {
        "hidden_states": torch.randn(1, 16, 1, 6, 6),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
    }
    stock = twin(**call).sample
    with dense(model) as handle:
        for _ in range(2):
            assert torch.equal(model(**call).sample, stock)
        assert counts(handle) == (2 * LAYERS, 0)
        for index in range(3):
            handle.step(index, 3, "cond")
            assert torch.equal(model(**call).sample, stock)
        assert counts(handle) == (LAYERS, 2 * LAYERS)


# --- the parts alone -------------------------------------------------------------------------------------------------
def test_unchanged_knows_every_kind_of_write() -> None:
    x = torch.arange(6.0)
    seen = Unchanged((x,))
    assert seen.holds_for((x,))
    assert not seen.holds_for((x.clone(),))
    assert not seen.holds_for((x, x))
    assert not seen.holds_for(())
    for write in (lambda: x.add_(0), lambda: x[2:].zero_(), lambda: x.detach().mul_(1), lambda: x.copy_(x)):
        seen = Unchanged((x,))
        write()
        assert not seen.holds_for((x,))


def test_unchanged_keeps_nothing_alive_and_is_not_fooled_by_a_reused_address() -> None:
    x = torch.zeros(4)
    seen, gone = Unchanged((x,)), weakref.ref(x)
    del x
    assert gone() is None
    assert not any(seen.holds_for((torch.zeros(4),)) for _ in range(50))


def test_unchanged_of_inference_tensors_never_holds() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
    assert not Unchanged((x,)).holds_for((x,))


def test_origin_names_what_it_cannot_see() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    origin = Origin((torch.zeros(1),)).through(plain, None)
    assert len(origin.tensors) == 1 + 2 + 2 + 3
    assert origin.unseen == ""
    plain[0].forward = lambda x: x
    assert "carries a hook" in Origin().through(plain).unseen


def test_text_kv_counts_runs_branches_and_sites_apart() -> None:
    kept, source = TextKV(), torch.zeros(1)
    sites = [Site(name, "g", i, None) for i, name in enumerate("ab")]
    made: list[int] = []

    def make() -> tuple[torch.Tensor, ...]:
        made.append(len(made))
        return (torch.full((3,), float(made[-1])),)

    def get(run: int, index: int, branch: str, site: Site) -> float:
        return float(kept.get(site, StepInfo(run, index, 3, branch), Origin((source,)), make)[0][0])

    with torch.no_grad():
        first = {(b, s.name): get(1, 0, b, s) for b in ("cond", "uncond") for s in sites}
        assert sorted(first.values()) == [0, 1, 2, 3]
        assert {(b, s.name): get(1, 1, b, s) for b in ("cond", "uncond") for s in sites} == first
        assert kept.nbytes == 4 * 12
        assert get(2, 0, "cond", sites[0]) == 4
        assert kept.nbytes == 12
