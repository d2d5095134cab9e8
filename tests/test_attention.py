"""The functional door on plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_every_recipe import small
from test_profile import SMALL, profile_of

import dit_accel
from dit_accel.errors import ConfigError

LAYOUT = dit_accel.TokenLayout(grid=(1, 12, 10), text=6, text_first=True)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, LAYOUT.length, 3, 16, generator=g).to(dtype) for _ in range(3))


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def test_density_one_is_stock() -> None:
    q, k, v = qkv()
    out, plan = dit_accel.attention(q, k, v, layout=LAYOUT, recipe="grat", density=1, return_plan=True)
    assert plan.dense
    assert torch.equal(out, stock(q, k, v))


def test_scale_and_bias_reach_the_kernel() -> None:
    q, k, v = qkv()
    bias = torch.zeros(2, 1, LAYOUT.length)
    bias[1, :, 3:6] = float("-inf")
    everything = {"base": "balanced", "name": "all", "select": {"kind": "top-p", "p": 1.0}}
    out = dit_accel.attention(q, k, v, layout=LAYOUT, recipe=everything, scale=0.5, key_bias=bias)
    torch.testing.assert_close(out, stock(q, k, v, attn_mask=bias[:, :, None], scale=0.5), rtol=1e-5, atol=1e-5)
    dense = dit_accel.attention(q, k, v, layout=LAYOUT, density=1, scale=0.5, key_bias=bias)
    torch.testing.assert_close(dense, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    out = dit_accel.attention(*qkv(dtype), layout=LAYOUT, recipe="draft", density=0.5)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", dit_accel.recipes())
def test_float64_is_float32_nearly(name: str) -> None:
    (out, plan), (wide, same) = (
        dit_accel.attention(*qkv(dtype), layout=LAYOUT, recipe=small(name), return_plan=True)
        for dtype in (torch.float32, torch.float64)
    )
    assert wide.dtype == torch.float64
    assert not same.dense
    if not plan.operator:
        assert torch.equal(plan.to_mask(), same.to_mask())
    torch.testing.assert_close(out.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", dit_accel.recipes())
def test_nothing_in_nothing_out(name: str) -> None:
    for shape in ((0, LAYOUT.length, 3, 16), (2, LAYOUT.length, 0, 16)):
        empty = torch.zeros(shape)
        out = dit_accel.attention(empty, empty, empty, layout=LAYOUT, recipe=name, density=0.5)
        assert out.shape == shape


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "hilbert-ear", "density": 0.5}, "where select.density is 0.3; in recipe 'hilbert-ear' it is 0.5"),
        ({"recipe": {"base": "hilbert-ear", "every": 3}}, "where every is 1; in recipe 'hilbert-ear' it is 3"),
        ({"recipe": {"base": "hilbert-ear", "name": "mine"}}, "where name is hilbert-ear; in recipe 'mine' it is mine"),
    ],
)
def test_a_state_of_another_recipe_names_what_differs(changes: dict[str, Any], said: str) -> None:
    state = dit_accel.AttentionState()
    rest: dict[str, Any] = {"layout": LAYOUT, "state": state, "density": 0.3}
    dit_accel.attention(*qkv(), recipe="hilbert-ear", **rest)
    dit_accel.attention(*qkv(), recipe="hilbert-ear", **rest)
    with pytest.raises(ConfigError) as error:
        dit_accel.attention(*qkv(), **{**rest, **changes})
    assert said in str(error.value)


def test_strided_inputs_need_no_copy() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    assert not q.is_contiguous()
    same = dit_accel.attention(*qkv(), layout=LAYOUT, recipe="draft")
    assert torch.equal(dit_accel.attention(q, k, v, layout=LAYOUT, recipe="draft"), same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": dit_accel.TokenLayout(grid=(1, 4, 4))}, r"q has 126 tokens, but the layout 1x4x4 has 16"),
        ({"recipe": "grot"}, "Did you mean 'grat'"),
        ({"density": 3}, "density: input should be less than or equal to 1"),
        ({"q": torch.zeros(2, 126, 16)}, r"\[B, S, H, D\]"),
        (dict.fromkeys("qkv", torch.zeros(2, 126, 3, 0)), "heads must be at least one wide"),
    ],
)
def test_bad_calls_are_named(change: dict[str, Any], message: str) -> None:
    q, k, v = qkv()
    good: dict[str, Any] = {"q": q, "k": k, "v": v, "layout": LAYOUT}
    dit_accel.attention(**good)
    with pytest.raises(ConfigError, match=message):
        dit_accel.attention(**{**good, **change})


OFFLINE = {  # recipes whose papers settle something offline, and what stands in for it
    "paro": "orders online",
    "sparse-vdit": "patterns online",
    "moa": "spans online",
    "duo": "measured online",
    "sta": "one window",
    "svoo": "one floor",
}
CALIBRATED = {"svoo": (0.2, 0.3)}  # a floor for each head; all others a pattern for each


@pytest.mark.parametrize("name", dit_accel.recipes())
def test_what_stands_in_for_a_calibration_is_named_in_the_plan(name: str) -> None:
    _, plan = dit_accel.attention(*qkv(), layout=LAYOUT, recipe=name, return_plan=True)
    assert plan.note.count("not calibrated: ") == (name in OFFLINE), plan.note
    assert OFFLINE.get(name, "") in plan.note


@pytest.mark.parametrize("name", OFFLINE)
def test_hosts_name_it_unless_a_profile_speaks(name: str) -> None:
    pipe, call = tiny.flux()
    settings = {**SMALL, "dense_layers": 0}
    said = []
    for profile in (None, profile_of(name, CALIBRATED.get(name, (0, 1)), **settings)):
        with dit_accel.accelerate(pipe, name, profile=profile, **settings) as handle:
            plans: list[str] = []
            handle.watchers = (lambda call, plan, out, plans=plans: plans.append(plan.note),)
            tiny.generate(pipe, call)
            said.append([plans, list(handle.report().notes)])
    (without, noted), (with_profile, unnoted) = said
    assert without
    assert all(note.count("not calibrated: ") == 1 for note in without)
    assert sum("not calibrated: " in note for note in noted) == 1
    assert with_profile
    assert not any("not calibrated" in note for note in [*with_profile, *unnoted])


@pytest.mark.parametrize("density", [0.4, 1])
@pytest.mark.parametrize(
    "shape", [(LAYOUT.length,), (1, LAYOUT.length), (1, 1, 5), (3, 1, LAYOUT.length), (2, 2, LAYOUT.length)]
)
def test_a_bias_of_another_shape_is_refused(shape: tuple[int, ...], density: float) -> None:
    with pytest.raises(ConfigError, match=r"key_bias is .*; expected \[2\|1, 3\|1, 126\]"):
        dit_accel.attention(*qkv(), layout=LAYOUT, density=density, key_bias=torch.zeros(shape))


@pytest.mark.parametrize("density", [0.4, 1])
def test_a_bias_that_is_a_mask_is_refused(density: float) -> None:
    mask = torch.ones(1, 1, LAYOUT.length, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"key_bias is .* torch.bool; expected .* of a floating dtype, -inf where"):
        dit_accel.attention(*qkv(), layout=LAYOUT, density=density, key_bias=mask)


@pytest.mark.parametrize("text", [0, 16, 64, 128])
@pytest.mark.parametrize("n", [1, 16, 40, 64, 100, 129, 300, 515, 1030])
def test_means_stand_for_the_rest_on_a_line_of_tokens(n: int, text: int) -> None:
    """Tokens that lie as they are need no order; their last unit may hold parts without a token."""
    layout = dit_accel.TokenLayout(grid=(1, 1, n), text=text)
    g = torch.Generator().manual_seed(n + text)
    q, k, v = (torch.randn(1, layout.length, 2, 16, generator=g) for _ in range(3))
    out = dit_accel.attention(q, k, v, layout=layout, recipe="hilbert-ear", density=0.3)
    assert torch.isfinite(out).all()
    equal = k.mean(1, keepdim=True).expand_as(k)  # keys and values all alike: their means say everything
    alike = v.mean(1, keepdim=True).expand_as(v)
    told = dit_accel.attention(q, equal, alike, layout=layout, recipe="hilbert-ear", density=0.3)
    torch.testing.assert_close(told, stock(q, equal, alike), rtol=1e-4, atol=1e-5)
