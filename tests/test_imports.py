"""Importing stays cheap, imports point one way, and Hugging Face's `kernels` stays importable beside our folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"kernels": set(), "dit_accel": {"kernels"}, "pipelines": {"kernels", "dit_accel"}}
HEAVY = ("triton", "diffusers.pipelines", "diffusers.models", "transformers", "cv2", "rich", "typer")


def python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(statement: str) -> set[str]:
    code = f"import torch, sys; before = set(sys.modules)\n{statement}\nprint(*sorted(set(sys.modules) - before))"
    return set(python(code).split())


def test_import_is_light() -> None:
    assert not {m for m in loaded_by("import dit_accel") if m.startswith(HEAVY)}


def test_public_names_load_no_triton_and_no_pipelines() -> None:
    loaded = loaded_by(
        "import dit_accel; dit_accel.accelerate, dit_accel.attention, dit_accel.plan, dit_accel.recipes()"
    )
    assert not {m for m in loaded if m.startswith(("triton", "diffusers.pipelines", "transformers"))}


def test_the_import_test_can_fail() -> None:
    assert {m for m in loaded_by("import transformers") if m.startswith(HEAVY)}


def test_import_takes_under_a_second_beyond_torch() -> None:
    """Of the processor's time: what else the machine runs does not count."""
    code = (
        "import torch, time; a = time.process_time(); import dit_accel; "
        "dit_accel.accelerate; dit_accel.attention; print(time.process_time() - a)"
    )
    assert min(float(python(code)) for _ in range(3)) < 1


@pytest.mark.parametrize("where", [ROOT, Path("/")], ids=["repository root", "elsewhere"])
def test_hugging_face_kernels_imports_beside_ours(where: Path) -> None:
    pytest.importorskip("kernels", reason="the `kernels` package is part of the dev extra")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from kernels import get_kernel; import kernels\n"
        "from dit_accel.kernels.block_sparse import block_sparse_attention as ours\n"
        "print(ours.__module__, kernels.__file__)"
    )
    module, file = python(code, where).split(" ", 1)
    assert module == "dit_accel.kernels.block_sparse.api"
    assert "site-packages" in file


def test_top_level_rooms_are_no_packages() -> None:
    """An __init__.py there would shadow other people's packages (see docs/architecture.md)."""
    for room in ("kernels", "pipelines", "eval", "examples"):
        assert not (ROOT / room / "__init__.py").exists()


def imported_rooms(source: str) -> set[str]:
    """Return which of our rooms a module's absolute imports name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{a.name}" for a in node.names] + [str(node.module)]
        if isinstance(node, ast.ImportFrom) and node.level >= 2 and node.module:
            names = [f"dit_accel.{node.module}"]
        for parts in (name.split(".") for name in names):
            if parts[0] == "dit_accel":
                inner = parts[1] if len(parts) > 1 else ""
                found.add(inner if inner in ("kernels", "pipelines", "eval") else "dit_accel")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    files = [f for f in (ROOT / room).rglob("*.py") if f.is_file()]
    if room == "dit_accel":
        files = [f for f in files if f.relative_to(ROOT / room).parts[0] not in ("kernels", "pipelines", "eval")]
    assert files
    allowed = ROOMS[room] | {room}
    for file in files:
        wrong = imported_rooms(file.read_text()) - allowed
        assert not wrong, f"{file} imports {wrong}"


def test_the_arrow_test_can_fail() -> None:
    assert imported_rooms("from dit_accel.eval.metrics import psnr") == {"eval"}
    assert imported_rooms("from dit_accel.layout import Grid\nimport torch") == {"dit_accel"}
