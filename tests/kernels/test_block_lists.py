"""Lists of key blocks from unit pairs: one table for both back ends."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel.kernels.block_lists import block_lists

on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def side(rng, units, block, lists):
    """Blocks of random units, some without tokens and some with holes; units own none, one or several blocks."""
    owners, tokens = [], []
    blocks = int(torch.randint(1, 2 * units + 2, (1,), generator=rng))
    for _ in range(lists[0] * lists[1]):
        owners.append(torch.randint(units, (blocks,), generator=rng).sort().values)
        full = torch.rand(blocks, generator=rng) < 0.5
        tokens.append(torch.where(full, block, torch.randint(0, block + 1, (blocks,), generator=rng)))
    return torch.stack(owners).view(*lists, blocks), torch.stack(tokens).view(*lists, blocks)


def call(seed, *, q_units=4, k_units=19, block=16, units=(2, 2), q_lists=(1, 1), k_lists=(1, 1), density=0.5):
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.rand(*units, q_units, k_units, generator=rng) < density
    (q_owner, q_tokens), (k_owner, k_tokens) = side(rng, q_units, 32, q_lists), side(rng, k_units, block, k_lists)
    return chosen, q_owner, k_owner, q_tokens, k_tokens, block


def slowly(units, q_owner, k_owner, q_tokens, k_tokens, block_k):
    """The definition, block by block."""
    b, h = torch.broadcast_shapes(units.shape[:2], q_owner.shape[:2], k_owner.shape[:2])
    units, q_owner, q_tokens, k_owner, k_tokens = (
        x.expand(b, h, *x.shape[2:]).tolist() for x in (units, q_owner, q_tokens, k_owner, k_tokens)
    )
    index, count, full_count, pairs = ([] for _ in range(4))
    for i, j in itertools.product(range(b), range(h)):
        for row, held in zip(q_owner[i][j], q_tokens[i][j], strict=True):
            at = [
                n
                for n, (unit, tokens) in enumerate(zip(k_owner[i][j], k_tokens[i][j], strict=True))
                if units[i][j][row][unit] and tokens and held
            ]
            full = [n for n in at if k_tokens[i][j][n] == block_k]
            ordered = full + [n for n in at if n not in full]
            index.append(ordered + [0] * (len(k_owner[i][j]) - len(ordered)))
            count.append(len(at))
            full_count.append(len(full))
            pairs.append(sum(k_tokens[i][j][n] for n in at) * held)
    rows = (b, h, len(q_owner[0][0]))
    return (
        torch.tensor(index, dtype=torch.int32).view(*rows, -1),
        torch.tensor(count, dtype=torch.int32).view(rows),
        torch.tensor(full_count, dtype=torch.int32).view(rows),
        torch.tensor(pairs).view(rows),
    )


def packed(units):
    """Bits as `PackedPlan` keeps them, spare ones set: they belong to no block."""
    padded = torch.nn.functional.pad(units, (0, -units.shape[-1] % 8), value=True)
    return (padded.unflatten(-1, (-1, 8)) * (1 << torch.arange(8))).sum(-1).to(torch.uint8)


def check(given, backend, device):
    expected = slowly(*given)
    *tensors, block = given
    for units in (tensors[0], packed(tensors[0])):
        made = block_lists(*(x.to(device) for x in (units, *tensors[1:])), block, backend=backend)
        for name, got, right in zip(made._fields, made, expected, strict=True):
            assert got.dtype == right.dtype, name
            assert got.is_contiguous(), name
            assert torch.equal(got.cpu(), right), name


@on_both
@pytest.mark.parametrize("units", [(1, 1), (2, 2)])
@pytest.mark.parametrize("lists", [((1, 1), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (2, 2)), ((2, 1), (1, 2))])
def test_matches_the_definition(lists, units, backend, device):
    check(call(3, units=units, q_lists=lists[0], k_lists=lists[1]), backend, device)


@on_both
@pytest.mark.parametrize("seed", range(4))
def test_random_sizes(seed, backend, device):
    rng = torch.Generator().manual_seed(900 + seed)
    q_units, k_units = (int(torch.randint(1, n, (1,), generator=rng)) for n in (6, 50))
    density = (0.0, 0.3, 1.1)[seed % 3]
    print("seed", seed, q_units, k_units, density)
    check(
        call(seed, q_units=q_units, k_units=k_units, density=density, k_lists=((1, 1), (2, 2))[seed % 2]),
        backend,
        device,
    )


@on_both
def test_rows_longer_than_a_tile_and_strided_masks(backend, device):
    given = call(5, q_units=2, k_units=700, units=(1, 1))
    check(given, backend, device)
    wide = torch.zeros(1, 1, 2, 1400, dtype=torch.bool)
    wide[..., ::2] = given[0]
    check((wide[..., ::2], *given[1:]), backend, device)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({0: torch.zeros(2, 3, 4)}, ValueError, "units is [2, 3, 4]; expected"),
        ({0: torch.zeros(2, 3, 4, 4)}, TypeError, "torch.float32; expected torch.bool"),
        ({1: torch.zeros(1, 1, 4, dtype=torch.int32)}, TypeError, "q_owner is torch.int32"),
        ({2: torch.zeros(4, dtype=torch.int64)}, ValueError, "k_owner is [4]"),
        ({3: torch.zeros(1, 1, 1, dtype=torch.int64)}, ValueError, "expected them alike"),
        ({0: torch.zeros(5, 3, 7, 19).bool(), 1: torch.zeros(2, 1, 4).long(), 3: torch.zeros(2, 1, 4).long()},
         ValueError, "differ in batch: [2, 5]"),
        ({5: 0}, ValueError, "block_k is 0"),
        ({"backend": "cuda"}, ValueError, "'cuda'; known are"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_was_given(changed, error, words):
    given = list(call(0))
    for at, value in changed.items():
        if isinstance(at, int):
            given[at] = value
    with pytest.raises(error) as told:
        block_lists(*given, backend=changed.get("backend", "reference"))
    assert words in str(told.value)
