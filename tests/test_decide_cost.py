"""What a decision may cost: no reading back from the device, no map over token pairs, no loop over heads or rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restate import with_tiles
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import dit_accel
from dit_accel.calibration.measure import coverage, patterns
from dit_accel.call import AttentionCall, Site
from dit_accel.kernels.block_mass import reference as block_mass
from dit_accel.kernels.block_max import reference as block_max
from dit_accel.kernels.block_sparse import cpu
from dit_accel.kernels.descent import reference as descent
from dit_accel.kernels.unit_error import reference as unit_error
from dit_accel.layout import TokenLayout
from dit_accel.sparsity import rows, scores
from dit_accel.sparsity.planner import Planner
from dit_accel.sparsity.recipes import resolve
from dit_accel.step import StepInfo

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")
NAMES = list(dit_accel.recipes())
LAYOUT = TokenLayout(grid=(4, 16, 24), text=7)


class Watch(TorchDispatchMode):
    """Count the operations, note those that would wait for a GPU, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.largest = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        self.count += 1
        if name in WAITING or (name in ("index", "index_put_") and any(_is_mask(at) for at in args[1])):
            self.waited.append(name)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and name not in ("expand", "view", "unsqueeze"):
                self.largest = max(self.largest, tensor.numel())
        return out


def _is_mask(index: Any) -> bool:
    """Say whether an index is a boolean mask, whose result has a size that only the device knows."""
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


@pytest.fixture(autouse=True)
def _kernels_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that a decision calls counts as one operation, whatever its stand-in on the CPU does."""
    attend = cpu.attend

    def unseen(problem: Any) -> Any:
        with _disable_current_modes():
            return attend(problem)

    monkeypatch.setattr(cpu, "attend", unseen)


def planned(name: str, heads: int, step: int, told: bool = False) -> Watch:
    """Watch one decision; `told`: each head has a pattern or floor of its own, as a calibration gives them."""
    recipe = resolve(name, block_q=16, block_k=16, dense_steps=0, dense_layers=0)
    if told and recipe.heads is not None:
        given = (0, 1) * (heads // 2)
        recipe = recipe.override(heads=recipe.heads.model_copy(update={"given": given}).model_dump())
    elif told:
        recipe = recipe.override(least=(0.1, 0.3) * (heads // 2))
    recipe = with_tiles(recipe, (1, 4, 4), (2, 4, 4))
    planner = Planner(recipe)
    site = Site("a", "a", 2, torch.nn.Identity(), 8)
    for at in range(step + 1):
        q, k, v = (torch.randn(1, LAYOUT.length, heads, 16) for _ in range(3))
        call = AttentionCall(site, StepInfo(1, at, 10, "0"), LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v)
        watch = Watch()
        with watch:
            planner.plan(call)
    return watch


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str) -> None:
    """From the second step on; the first one of a layout may make tables."""
    assert planned(name, 2, 1).waited == []


@pytest.mark.parametrize("name", NAMES)
def test_no_map_over_token_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, scores, block_mass, block_max, descent, unit_error):
        monkeypatch.setattr(module, "BYTES", 1 << 20)
    assert planned(name, 2, 1).largest < LAYOUT.length**2


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_not_looped_over(name: str) -> None:
    two, six = (planned(name, heads, 1).count for heads in (2, 6))
    assert two == six


@pytest.mark.parametrize("name", ["paro", "duo", "svg1", "svg2", "jenga"])
def test_heads_that_are_told_cost_no_more(name: str) -> None:
    two, six = (planned(name, heads, 1, told=True) for heads in (2, 6))
    assert two.waited == []
    assert two.count == six.count
    more = 2 if resolve(name).heads is None else 0  # a product and a rounding on the device, for floors
    assert two.count <= planned(name, 2, 1).count + more


@pytest.mark.parametrize("name", ["paro", "sparse-vdit", "moa", "sta", "svg2"])
def test_measuring_a_call_holds_no_map_and_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a calibration measures of a call, a run of queries at a time."""
    for module in (rows, scores, block_mass, block_max, descent, unit_error):
        monkeypatch.setattr(module, "BYTES", 1 << 20)
    recipe = resolve(name, block_q=16, block_k=16)
    choice = recipe.heads or recipe.search
    measure = patterns(recipe, choice, 300) if choice else coverage(300)
    site = Site("a", "a", 0, torch.nn.Identity(), 8)
    q, k, v = (torch.randn(1, LAYOUT.length, 2, 16) for _ in range(3))
    call = AttentionCall(site, StepInfo(1, 0, 10, "0"), LAYOUT, q, k, v, 0.25, stock=lambda q, k, v: v)
    measure(call)  # the first call of a layout makes tables
    watch = Watch()
    with watch:
        found = measure(call)
    assert torch.isfinite(found).all()
    assert watch.waited == []
    assert watch.largest < LAYOUT.length**2


def test_the_watch_sees_a_wait() -> None:
    watch = Watch()
    with watch:
        bool(torch.ones(1).any())
        torch.arange(4)[torch.tensor([True, False, True, True])]
    assert set(watch.waited) == {"_local_scalar_dense", "index"}
