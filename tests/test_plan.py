"""Plans check themselves, count their pairs, survive packing, and branches merge exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_accel.attend import run
from dit_accel.config import HilbertOrder, RasterOrder, TileOrder
from dit_accel.errors import PlanError
from dit_accel.kernels.bits import as_mask
from dit_accel.layout import TokenLayout
from dit_accel.sparsity.plan import Branch, PackedPlan, Plan
from dit_accel.sparsity.plan import from_units as from_cut
from dit_accel.sparsity.tiling import Tiling, tiling

ORDERS = [RasterOrder(), TileOrder(picture=(1, 4, 4), video=(2, 4, 4)), HilbertOrder()]


def from_units(mask: torch.Tensor, tiles: Tiling) -> Plan:
    return from_cut(mask, tiles.on(mask.device).cut)


def random_units(cut: Tiling, seed: int, b: int = 2, h: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, h, cut.units, cut.units, generator=g) < 0.4
    return mask | torch.eye(cut.units, dtype=torch.bool)


def slow_mask(units: torch.Tensor, cut: Tiling) -> torch.Tensor:
    """Spell a unit mask out token by token."""
    owner = {int(t): u for u, row in enumerate(cut.slots.reshape(cut.units, -1)) for t in row if t >= 0}
    where = torch.tensor([owner[t] for t in range(cut.layout.length)])
    return units[..., where[:, None], where[None]]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: o.kind)
@pytest.mark.parametrize("shape", [(1, 13, 11), (3, 5, 7), (1, 16, 16), (1, 1, 1)])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64), (128, 64)])
def test_mask_pairs_and_density(order: RasterOrder, shape: tuple[int, int, int], blocks: tuple[int, int]) -> None:
    cut = tiling(TokenLayout(grid=shape, text=5), order, *blocks)
    units = random_units(cut, 1)
    plan = from_units(units, cut).check()
    expected = slow_mask(units, cut)
    assert torch.equal(plan.to_mask(), expected)
    assert plan.pairs is not None
    assert torch.equal(plan.pairs, expected.sum((-1, -2)))
    torch.testing.assert_close(plan.density_per_head(), expected.float().mean((-1, -2)))


@pytest.mark.parametrize("units", [1, 7, 8, 9, 100])
def test_packing_is_lossless_and_an_eighth(units: int) -> None:
    cut = tiling(TokenLayout(grid=(1, 1, 16 * units)), RasterOrder(), 16, 16)
    mask = random_units(cut, units)
    packed = PackedPlan.pack(mask, cut.on(mask.device).cut, note="kept")
    assert torch.equal(as_mask(packed.bits)[..., : mask.shape[-1]], mask)
    assert packed.nbytes == 2 * 3 * units * -(-units // 8)
    assert torch.equal(packed.expand().to_mask(), from_units(mask, cut).to_mask())
    assert packed.expand().note == "kept"


def one_branch(seed: int = 0) -> tuple[Plan, Tiling]:
    cut = tiling(TokenLayout(grid=(1, 8, 8), text=3), TileOrder(picture=(1, 4, 4)), 16, 16)
    return from_units(random_units(cut, seed), cut), cut


def test_index_out_of_range_is_found() -> None:
    plan, _ = one_branch()
    branch = plan.branches[0]
    broken = replace(branch, index=torch.where(branch.index == 0, 99, branch.index))
    with pytest.raises(PlanError, match=r"outside 0\.\."):
        replace(plan, branches=(broken,)).check()


def test_repeated_block_is_found() -> None:
    plan, _ = one_branch()
    branch = plan.branches[0]
    index = branch.index.clone()
    index[..., 1] = index[..., 0]
    with pytest.raises(PlanError, match="listed twice"):
        replace(plan, branches=(replace(branch, index=index),)).check()


def test_empty_row_is_found_unless_its_head_is_skipped() -> None:
    plan, _ = one_branch()
    branch = plan.branches[0]
    count = branch.count.clone()
    count[:, 1] = 0
    broken = replace(branch, count=count)
    with pytest.raises(PlanError, match=r"head 1 has no key"):
        replace(plan, branches=(broken,)).check()
    skipped = replace(broken, skip_heads=torch.tensor([False, True, False]))
    replace(plan, branches=(skipped,)).check()


def test_overlapping_branches_are_found() -> None:
    plan, _ = one_branch()
    with pytest.raises(PlanError, match="two branches compute the same pair"):
        replace(plan, branches=plan.branches * 2).check()


def test_disjoint_branches_merge_to_their_union() -> None:
    cut = tiling(TokenLayout(grid=(1, 13, 11), text=5), TileOrder(picture=(1, 4, 4)), 16, 16)
    units = random_units(cut, 4)
    half = torch.rand(units.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    parts = [from_units(part, cut) for part in (units & half, units & ~half)]
    q, k, v = (torch.randn(2, 148, 3, 16) for _ in range(3))
    whole = run(from_units(units, cut), q, k, v)
    both = Plan(148, 148, branches=parts[0].branches + parts[1].branches).check()
    torch.testing.assert_close(run(both, q, k, v), whole, rtol=1e-5, atol=1e-5)


def test_dense_plan_is_the_full_mask() -> None:
    plan = Plan(3, 4)
    assert plan.dense
    assert plan.check().to_mask().all()
    assert float(plan.density()) == 1
    assert plan.nbytes == 0


def test_bytes_and_picture() -> None:
    plan, _ = one_branch()
    branch = plan.branches[0]
    assert plan.nbytes >= branch.index.numel() * 4 + branch.count.numel() * 4
    picture = plan.draw(64)
    assert picture.size == (3 * 72 - 8, 64)
    assert {0, 255} <= set(
        picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata()
    )


def test_branch_with_a_predicate_masks_by_it() -> None:
    from dit_accel.kernels.block_sparse import Predicate

    coords = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8]).int()
    everything = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    branch = Branch(
        16,
        16,
        everything,
        torch.full((1, 1, 4), 4, dtype=torch.int32),
        full_count=torch.zeros(1, 1, 4, dtype=torch.int32),
        predicate=Predicate("box", (0, 1, 2), coords, coords),
    )
    mask = Plan(64, 64, (branch,)).check().to_mask()[0, 0]
    for i in range(64):
        for j in range(64):
            assert bool(mask[i, j]) == (abs(i // 8 - j // 8) <= 1 and abs(i % 8 - j % 8) <= 2)
