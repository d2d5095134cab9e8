"""The user's own table of tiles: read once, used where it fits, refused where it is malformed, and a way back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse_attention, triton, tuned
from dit_accel.kernels.block_sparse.tiles import Tile

GPU = "Made GPU 80GB"
CPU = torch.device("cpu")
TILE = {"q": 32, "k": 16, "warps": 4, "stages": 2, "tma": False, "pack": True}
ENTRY = {
    "precision": "as given", "kind": "holes", "dim": 64, "block_q": 64, "block_k": 32, "tile": TILE, "ms": 1,
    "before_ms": 1.5, "error": 0.001,
}  # fmt: skip


def table(**changes: Any) -> dict[str, Any]:
    made = {
        "format": 1, "gpu": GPU, "capability": [9, 0], "torch": "2", "triton": tuned.triton_version(),
        "dit_accel": "0", "commit": "", "date": "2026-01-01", "kernels": tuned.source_hash(), "tiles": [ENTRY],
    }  # fmt: skip
    return {**made, **changes}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let the CPU be a GPU with a name, and its table lie in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_name", lambda device: GPU)
    tuned.forget()
    path = tuned.path(GPU)
    path.parent.mkdir(parents=True)
    yield path
    tuned.forget()


def found(block_k: int = 32, **changes: Any) -> Tile | None:
    asked = {"precision": "as given", "kind": "holes", "padded_dim": 64, "block_q": 64, **changes}
    return tuned.tile_for(CPU, block_k=block_k, **asked)


def test_no_file_is_the_committed_table(file: Path) -> None:
    assert found() is None


def test_a_measured_tile_is_found_by_its_call(file: Path) -> None:
    file.write_text(json.dumps(table()))
    assert found() == Tile(**TILE)
    assert found(block_k=96) == Tile(**TILE)  # 32 is the power of two in 96
    others: list[dict[str, Any]] = [{"precision": "int8"}, {"kind": "plain"}, {"padded_dim": 128}, {"block_q": 128}]
    assert [found(**other) for other in others] == [None] * 4
    assert found(block_k=64) is None


def test_the_file_is_read_once(file: Path) -> None:
    file.write_text(json.dumps(table()))
    assert found() is not None
    file.unlink()
    assert found() is not None
    tuned.forget()
    assert found() is None


@pytest.mark.parametrize("other", [{"gpu": "Another"}, {"triton": "1.0"}, {"kernels": "0123"}])
def test_what_was_measured_elsewhere_is_left_alone(file: Path, other: dict[str, Any]) -> None:
    file.write_text(json.dumps(table(**other)))
    assert found() is None
    read = tuned.read(file)
    assert read is not None
    (name,) = other
    assert read.misfit(GPU).startswith(f"{name} was ")


def test_a_table_is_written_as_it_is_read(file: Path) -> None:
    made = tuned.Table.model_validate_json(json.dumps(table()))
    tuned.write(made, file)
    assert tuned.read(file) == made
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert [field.name for field in dataclasses.fields(Tile)] == list(tuned.Shape.model_fields)


MALFORMED = {
    "format": table(format=2),
    "gpu": {key: value for key, value in table().items() if key != "gpu"},
    "speed": table(speed=3),
    "tiles.0.kind": table(tiles=[{**ENTRY, "kind": "hole"}]),
    "tiles.0.tile.warps": table(tiles=[{**ENTRY, "tile": {**TILE, "warps": 3}}]),
    "tiles.0.tile.tma": table(tiles=[{**ENTRY, "tile": {**TILE, "tma": 1}}]),
    "tiles.0.ms": table(tiles=[{**ENTRY, "ms": 0}]),
    "tiles.0: value error, tile: 128 x 16 is larger": table(tiles=[{**ENTRY, "tile": {**TILE, "q": 128}}]),
    "capability": table(capability=[9]),
}


@pytest.mark.parametrize("field", MALFORMED)
def test_a_malformed_table_is_refused_by_the_field(file: Path, field: str) -> None:
    file.write_text(json.dumps(MALFORMED[field]))
    with pytest.raises(ValueError) as caught:
        found()
    message = str(caught.value)
    assert message.startswith(f"{file}: {field}")
    assert "--reset" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_what_is_no_table_is_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="the file: "):
        found()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernel_takes_the_tile_and_the_result_is_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Tile] = []
    launch = triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda problem, tile, *rest: used.append(tile) or launch(problem, tile, *rest)
    )
    q, k, v = torch.randn(3, 1, 128, 2, 64, dtype=torch.float16)
    order = torch.randperm(128).int()[None, None]
    index = torch.tensor([[[[0, 1, 2, 3], [3, 1, 0, 2]]]], dtype=torch.int32)
    count = torch.tensor([[[3, 2]]], dtype=torch.int32)

    def call(x: torch.Tensor) -> torch.Tensor:
        orders = {"q_order": order, "k_order": order}
        return block_sparse_attention(
            x, k.to(x.dtype), v.to(x.dtype), index, count, block_q=64, block_k=32, backend="triton", **orders
        )[0]

    committed = call(q)
    tuned.forget()
    file.write_text(json.dumps(table()))
    torch.testing.assert_close(call(q), committed, rtol=2e-3, atol=2e-3)
    call(q.float())  # tiles are measured in half precision
    assert used[1] == Tile(**TILE)
    assert used[0] != used[1] != used[2]
