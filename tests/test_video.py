"""Video hosts: unrotated keys, keeps, guidance branches, experts, padding, fused and parallel settings, clean runs."""

from __future__ import annotations

from typing import Any

import pytest
import test_hosts
import test_restore
import tiny
import torch

import dit_accel
from dit_accel.call import AttentionCall
from dit_accel.errors import UnsupportedError

VIDEO = [make.__name__ for make in tiny.VIDEO]


def watched(pipe: Any, call: dict[str, Any], steps: int = 2, **options: Any) -> list[AttentionCall]:
    """Run a sparse clip and return every attention call that reached the plan."""
    seen: list[AttentionCall] = []

    def watch(attention: AttentionCall) -> AttentionCall:
        seen.append(attention)
        return attention

    with dit_accel.accelerate(pipe, test_hosts.SPARSE, **options) as handle:
        handle.stages = (watch,)
        tiny.generate(pipe, call, steps=steps)
    return seen


@pytest.mark.parametrize("name", VIDEO)
def test_unrotated_queries_and_keys_are_at_hand(name: str) -> None:
    seen = watched(*tiny.FAMILIES[name]())
    assert seen
    for call in seen:
        assert call.q_raw is not None
        assert call.k_raw is not None
        assert call.rotate is not None
        for raw, turned in ((call.q_raw, call.q), (call.k_raw, call.k)):
            assert torch.equal(call.rotate(raw), turned)
            pairs = [x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (raw, turned)]
            torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-5)  # a rotation keeps the length of each pair
            start = call.layout.length - call.layout.main.length if name.startswith("cog") else 0
            text = torch.ones(call.layout.length, dtype=torch.bool)
            text[start : start + call.layout.main.length] = False
            assert torch.equal(raw[:, text], turned[:, text])
            assert torch.equal(raw[:, start], turned[:, start])  # position 0 is not turned
            assert torch.equal(raw, turned) == (name == "cogvideox")  # which adds its positions instead


@pytest.mark.parametrize("name", ["wan", "wan_image", "hunyuan_video", "cogvideox_rotary"])
def test_first_latent_frame_as_a_keep(name: str) -> None:
    pipe, call = tiny.FAMILIES[name]()
    options = {"first_frame": True, "density": 0.5}
    for attention in watched(pipe, call, **options):
        planner = dit_accel.sparsity.planner.Planner(test_hosts.SPARSE.override(**options))
        grid = attention.layout.main
        start = attention.layout.length - grid.length if name.startswith("cog") else 0
        frame = slice(start, start + grid.height * grid.width)
        mask = planner.plan(attention).to_mask()
        assert mask[..., frame].all()
        assert not mask.all()


def test_branches_steps_and_experts_over_one_run() -> None:
    pipe, call = tiny.wan_two_experts()
    seen = watched(pipe, call, steps=5)
    where = [(a.site.name.split(".")[0], a.step.index, a.step.total, a.step.branch) for a in seen]
    experts = ["transformer" if t >= 900 else "transformer_2" for t in pipe.scheduler.timesteps]
    assert set(experts) == {"transformer", "transformer_2"}
    layers, branches = 2, ("cond", "uncond")
    assert where == [(e, i, 5, b) for i, e in enumerate(experts) for b in branches for _ in range(layers)]
    assert len({a.step.run for a in seen}) == 1


def test_guidance_branches_do_not_share_plans() -> None:
    """With decisions reused, the guided clip must not depend on which branch decided first."""
    seen = watched(*tiny.wan(), steps=4, every=4)
    for branch in ("cond", "uncond"):
        assert [a.step.index for a in seen if a.step.branch == branch] == [0, 0, 1, 1, 2, 2, 3, 3]
    pipe, call = tiny.wan()
    with dit_accel.accelerate(pipe, test_hosts.SPARSE, every=4) as handle:
        tiny.generate(pipe, call, steps=4)
        assert {branch for _, branch in handle._engine.planner._kept} == {"cond", "uncond"}


def resized(call: dict[str, Any]) -> dict[str, Any]:
    """Ask for another odd size, fewer frames and another prompt."""
    height, width = call["width"], call["height"]
    call = {**call, "height": height, "width": width, "num_frames": 5}
    return {**call, "prompt": "red taco"} if "prompt" in call else call


@pytest.mark.parametrize("name", VIDEO)
def test_second_clip_of_another_size_after_a_cancelled_run(name: str) -> None:
    (pipe, call), (fresh, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    with test_restore.accelerated(fresh, every=2):
        expected = tiny.generate(fresh, resized(call), steps=3, seed=5)
    with test_restore.accelerated(pipe, every=2):
        tiny.generate(pipe, call, steps=3)
        with pytest.raises(test_restore.CancelledError):
            tiny.generate(pipe, resized(call), steps=3, callback_on_step_end=test_restore.cancel_in_step_two)
        assert torch.equal(tiny.generate(pipe, resized(call), steps=3, seed=5), expected)


def test_prompts_of_different_lengths_in_one_batch() -> None:
    """HunyuanVideo: each sample hides its own padding, and equals itself alone."""
    pipe, call = tiny.hunyuan_video()
    prompts = ["dance", "a red cat and the blue dog of taco"]
    call["prompt"] = prompts
    stock = tiny.generate(pipe, call)
    noise = torch.randn(stock.shape, generator=torch.Generator().manual_seed(2))
    with dit_accel.accelerate(pipe, test_hosts.FULL) as handle:
        torch.testing.assert_close(tiny.generate(pipe, call), stock, rtol=1e-4, atol=1e-4)
        assert handle.report().density == 1
        assert handle.report().layout == "3x11x7 + 16 text"
        together = tiny.generate(pipe, call, latents=noise.clone())
        for i, prompt in enumerate(prompts):
            alone = tiny.generate(pipe, {**call, "prompt": prompt}, latents=noise[i : i + 1].clone())
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    with dit_accel.accelerate(pipe, test_hosts.SPARSE, density=1):
        assert torch.equal(tiny.generate(pipe, call), stock)


def test_padding_is_left_out_where_all_prompts_are_equally_long() -> None:
    pipe, call = tiny.hunyuan_video()
    (one, *_), (two, *_) = watched(pipe, call), watched(pipe, {**call, "prompt": ["dance", "a cat dance"]})
    assert str(one.layout) == "3x11x7 + 3 text"
    assert one.key_bias is None
    assert one.k.shape[1] == one.layout.length
    assert two.key_bias is not None
    assert two.key_bias.shape == (2, 1, 3 * 11 * 7 + 16)  # no S x S mask
    assert [int(n) for n in torch.isinf(two.key_bias).sum((-1, -2))] == [14, 12]


def test_text_lengths_are_read_once_a_prompt() -> None:
    pipe, call = tiny.hunyuan_video()
    call |= {"negative_prompt": "a", "true_cfg_scale": 2.0}
    with dit_accel.accelerate(pipe, test_hosts.SPARSE) as handle:
        tiny.generate(pipe, call, steps=4)
        assert [valid for _, valid in handle._attachments[0]._memo["masks"]] == [3, 2]
        assert handle.report().layout == "3x11x7 + 3 text + 13 pad, 3x11x7 + 2 text + 14 pad"


@pytest.mark.parametrize("name", ["wan", "wan_image", "cogvideox", "cogvideox_rotary"])
def test_fused_projections_are_honoured(name: str) -> None:
    pipe, call = tiny.FAMILIES[name]()
    pipe.transformer.fuse_qkv_projections()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, test_hosts.FULL) as handle:
        ours = tiny.generate(pipe, call)
        assert handle.report().sparse_calls == handle.report().calls > 0
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "wan_image"])
def test_projections_fused_while_accelerated_are_honoured(name: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    twin.transformer.fuse_qkv_projections()
    stock = tiny.generate(twin, call)
    with dit_accel.accelerate(pipe, test_hosts.FULL) as handle:
        pipe.transformer.fuse_qkv_projections()
        ours = tiny.generate(pipe, call)
        assert handle.report().sparse_calls == handle.report().calls > 0
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_processors_replaced_while_accelerated_are_named() -> None:
    """Fusing gives CogVideoX new processors: they are the user's and run as they are, which the report says."""
    (pipe, call), (twin, _) = tiny.cogvideox_rotary(), tiny.cogvideox_rotary()
    twin.transformer.fuse_qkv_projections()
    stock = tiny.generate(twin, call)
    with dit_accel.accelerate(pipe, test_hosts.SPARSE) as handle:
        pipe.transformer.fuse_qkv_projections()
        assert torch.equal(tiny.generate(pipe, call), stock)
        assert {row.reason for row in handle.report().rows} == {"its processor was replaced after accelerate()"}
    calls = handle.report().calls
    for target in (pipe, twin):  # which puts the stand-ins back that were there when the projections were fused
        target.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
    assert handle.report().calls == calls


def test_context_parallel_models_are_refused() -> None:
    pipe, _ = tiny.wan()
    for block in pipe.transformer.blocks:
        block.attn1.processor._parallel_config = object()
    with pytest.raises(UnsupportedError, match="context parallelism is on"):
        dit_accel.accelerate(pipe, test_hosts.SPARSE)


def test_context_parallelism_turned_on_later_leaves_the_call_to_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_wan

    pipe, call = tiny.wan()
    stock = tiny.generate(pipe, call)
    real, configs = transformer_wan.dispatch_attention_fn, []

    def alone(*args: Any, parallel_config: Any = None, **kwargs: Any) -> torch.Tensor:
        configs.append(parallel_config)
        return real(*args, **kwargs)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", alone)
    with dit_accel.accelerate(pipe, test_hosts.SPARSE) as handle:
        for block in pipe.transformer.blocks:
            block.attn1.processor._parallel_config = "two devices"
        assert torch.equal(tiny.generate(pipe, call), stock)
        assert {row.reason for row in handle.report().rows} == {"context parallelism is on"}
    assert set(configs) == {"two devices"}


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_attention_backend_the_user_sets_is_used_where_dense(name: str) -> None:
    (pipe, call), (twin, _) = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    with dit_accel.accelerate(pipe, test_hosts.SPARSE, density=1):
        for target in (pipe, twin):
            for module in target.transformer.modules():
                if hasattr(module, "processor") and hasattr(module.processor, "_attention_backend"):
                    module.processor._attention_backend = "_native_math"
        assert torch.equal(tiny.generate(pipe, call), tiny.generate(twin, call))
