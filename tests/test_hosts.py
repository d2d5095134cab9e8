"""Every family: geometry and step read from the call, density 1 is stock, batch items stand alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import tiny
import torch

import dit_accel
from dit_accel import api
from dit_accel.call import AttentionCall
from dit_accel.config import Recipe
from dit_accel.hosts import all_families, family_of
from dit_accel.sparsity.recipes import resolve

SPARSE: Recipe = resolve(
    "draft", density=0.5, dense_steps=0, picture=(1, 4, 4), video=(1, 4, 4), block_q=16, block_k=16
)
FULL = SPARSE.override(select={"kind": "top-p", "p": 1.0}, name="everything")
LAYOUTS = {
    "flux": "16 text + 1x17x13",
    "kontext": "16 text + 1x11x9 + 1x17x13 reference",
    "sd3": "1x25x21 + 93 text",
    "wan": "3x5x3",
    "wan_two_experts": "3x5x3",
    "wan_per_token_time": "3x5x3",
    "wan_image": "3x5x3",
    "wan_image_per_token_time": "3x5x3",
    "hunyuan_video": "3x11x7 + 3 text + 13 pad",
    "cogvideox": "16 text + 3x11x7",
    "cogvideox_rotary": "16 text + 3x11x7",
    "qwen_image": "8 text + 1x13x9",
    "ltx": "3x11x7",
    "pixart": "1x19x11",
    "z_image": "1x17x13 + 3 pad + 32 text",
}
BATCHED_GUIDANCE = {"sd3", "cogvideox", "cogvideox_rotary", "ltx", "pixart", "z_image"}


def batched(call: dict[str, Any], n: int) -> dict[str, Any]:
    """Ask for n samples: by a list of prompts, by embeddings for each, or by a number where the pipeline wants that."""
    if "image" in call and "prompt_embeds" in call:
        return {**call, **{key: call[key].repeat(n, 1, 1) for key in call if key.endswith("_embeds")}}
    if "prompt" not in call:
        return {**call, "num_images_per_prompt": n}
    return {**call, **{key: [call[key]] * n for key in ("prompt", "negative_prompt") if key in call}}


def guided(name: str, call: dict[str, Any], on: bool) -> dict[str, Any]:
    """Ask for two branches, or for one."""
    if name == "qwen_image":
        return {**call, "true_cfg_scale": 2.0 if on else 1.0}
    if name in ("flux", "kontext"):
        return {**call, "negative_prompt": "a dog", "true_cfg_scale": 2.0} if on else call
    return {**call, "guidance_scale": 3.0 if on else 1.0}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_layout_is_read_from_the_call(name: str) -> None:
    pipe, call = tiny.FAMILIES[name]()
    with dit_accel.accelerate(pipe, SPARSE) as handle:
        tiny.generate(pipe, call)
    assert handle.report().layout.startswith(LAYOUTS[name])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_sparse_runs_differ_and_are_counted(name: str) -> None:
    pipe, call = tiny.FAMILIES[name]()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, SPARSE) as handle:
        sparse = tiny.generate(pipe, call)
    report = handle.report()
    assert torch.isfinite(sparse).all()
    assert not torch.equal(stock, sparse)
    assert report.sparse_calls == report.calls > 0
    assert abs(report.density - 0.5) < 0.1, report


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_density_one_is_stock_bit_for_bit(name: str, guidance: bool) -> None:
    pipe, call = tiny.FAMILIES[name]()
    call = batched(guided(name, call, guidance), 3)
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, SPARSE, density=1):
        assert torch.equal(tiny.generate(pipe, call), stock)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_kernel_on_every_pair_is_stock_within_rounding(name: str) -> None:
    """Run our kernel on all pairs: masks, padding, order and scale must all be right for this to hold."""
    pipe, call = tiny.FAMILIES[name]()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, FULL) as handle:
        ours = tiny.generate(pipe, call)
    report = handle.report()
    assert report.sparse_calls == report.calls
    assert report.density == 1
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_batch_item_equals_itself_alone(name: str) -> None:
    pipe, call = tiny.FAMILIES[name]()
    shape = tiny.generate(pipe, call, steps=1).shape[1:]
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
    with dit_accel.accelerate(pipe, SPARSE):
        together = tiny.generate(pipe, batched(call, 3), latents=noise.clone())
        alone = [tiny.generate(pipe, call, latents=noise[i : i + 1].clone()) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_step_sigma_and_branch_are_known_at_every_call(name: str, guidance: bool) -> None:
    pipe, call = tiny.FAMILIES[name]()
    call = guided(name, call, guidance)
    seen: list[AttentionCall] = []

    def watch(attention: AttentionCall) -> AttentionCall:
        seen.append(attention)
        return attention

    with dit_accel.accelerate(pipe, SPARSE) as handle:
        handle.stages = (watch,)
        tiny.generate(pipe, call, steps=3)
        first = len(seen)
        tiny.generate(pipe, call, steps=2)
    sequential = guidance and name not in BATCHED_GUIDANCE and name != "hunyuan_video"
    for run, steps in ((seen[:first], 3), (seen[first:], 2)):
        assert [index for index, _ in itertools.groupby(a.step.index for a in run)] == list(range(steps))
        assert {a.step.total for a in run} == {steps}
        assert {a.step.run for a in run} == {1 if steps == 3 else 2}
        for index in range(steps):
            branches = {a.step.branch for a in run if a.step.index == index}
            assert len(branches) == (2 if sequential else 1), branches
        levels = [sigma for sigma, _ in itertools.groupby(a.step.sigma for a in run)]
        assert len(levels) == steps
        assert None not in levels
        assert levels == sorted(levels, reverse=True)  # type: ignore[type-var]


def test_sites_are_the_self_attentions_only() -> None:
    pipe, _ = tiny.wan()
    with dit_accel.accelerate(pipe, SPARSE) as handle:
        assert [site.name for site in handle.sites] == ["blocks.0.attn1", "blocks.1.attn1"]


def test_every_family_class_exists_in_diffusers() -> None:
    for family in all_families():
        for name in family.classes:
            assert hasattr(diffusers, name), name


@pytest.fixture
def unwarned() -> Iterator[None]:
    """The warning comes once a process: let it come here, and again after this."""
    api._warn_of_untested_diffusers.cache_clear()
    yield
    api._warn_of_untested_diffusers.cache_clear()


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize(("version", "warned"), [("0.42.3", 0), ("0.40.0", 0), ("0.43.0.dev0", 1), ("1.0", 1)])
def test_a_diffusers_newer_than_the_tested_one_is_warned_of_once(
    version: str, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "TESTED_DIFFUSERS", (0, 42))
    monkeypatch.setattr(diffusers, "__version__", version)
    model = tiny.flux_transformer()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            dit_accel.accelerate(model, SPARSE).restore()
    about = [str(w.message) for w in seen if w.filename == __file__]
    assert len(about) == warned
    assert all(f"tested with diffusers up to 0.42, this is {version}" in message for message in about)


def test_subclass_of_a_known_transformer_is_found() -> None:
    class Mine(type(tiny.flux_transformer())):  # type: ignore[misc]
        pass

    family = family_of(Mine(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2))
    assert family is not None
    assert family.name == "flux"


def test_flux_with_fused_projections() -> None:
    pipe, call = tiny.flux()
    pipe.transformer.fuse_qkv_projections()
    stock = tiny.generate(pipe, call)
    with dit_accel.accelerate(pipe, FULL) as handle:
        ours = tiny.generate(pipe, call)
    assert handle.report().sparse_calls > 0
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_attention_mask_that_differs_per_query_stays_dense_with_the_reason() -> None:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float()
    call = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
        "attention_mask": torch.ones(1, 24, dtype=torch.bool),
    }
    with torch.no_grad(), dit_accel.accelerate(model, SPARSE, dense_steps=0) as handle:
        handle.step(0, 1)
        model(**call)
    report = handle.report()
    assert report.sparse_calls == 0
    assert "differs from query to query" in report.rows[0].reason


def test_irregular_position_ids_stay_dense_with_the_reason() -> None:
    model = tiny.flux_transformer().eval()
    ids = torch.zeros(15, 3)
    ids[:, 1] = torch.arange(15) // 4
    ids[:, 2] = torch.arange(15) % 4  # the last row is one short
    with torch.no_grad(), dit_accel.accelerate(model, SPARSE) as handle:
        handle.step(0, 1)
        model(
            hidden_states=torch.randn(1, 15, 4),
            encoder_hidden_states=torch.randn(1, 8, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(8, 3),
        )
    assert handle.report().rows[0].reason == "img_ids is no full raster grid"


def test_backend_that_bypasses_sdpa_is_noticed() -> None:
    """A processor that never calls scaled_dot_product_attention must show up as dense, not as sparse."""
    pipe, call = tiny.wan()

    class Own:
        _attention_backend = None
        _parallel_config = None

        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    pipe.transformer.blocks[0].attn1.processor = Own()
    with dit_accel.accelerate(pipe, SPARSE) as handle:
        tiny.generate(pipe, call)
    assert any("bypasses" in row.reason for row in handle.report().rows)


def test_gradients_stay_stock() -> None:
    model = tiny.flux_transformer()
    x = torch.randn(1, 16, 4, requires_grad=True)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float()
    with dit_accel.accelerate(model, SPARSE) as handle:
        handle.step(0, 1)
        out = model(
            hidden_states=x,
            encoder_hidden_states=torch.randn(1, 8, 32),
            pooled_projections=torch.randn(1, 32),
            timestep=torch.tensor([0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(8, 3),
        ).sample
    out.sum().backward()
    assert x.grad is not None
    assert handle.report().rows[0].reason == "gradients are asked for"
