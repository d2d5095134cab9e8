"""A wheel built from the tree works in an empty environment outside it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build and install the wheel; return the environment's bin folder and an empty working folder."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    binaries = folder / "env" / "bin"
    run(binaries / "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    (folder / "empty").mkdir()
    return binaries, folder / "empty"


def inside(installed: tuple[Path, Path], *command: str) -> str:
    """Run in the new environment, with this one's libraries (but not this checkout) on the path."""
    binaries, cwd = installed
    libraries = sysconfig.get_paths()["purelib"]
    return run(binaries / command[0], *command[1:], cwd=cwd, PYTHONPATH=libraries)


def test_the_package_comes_from_the_wheel(installed: tuple[Path, Path]) -> None:
    code = "import dit_accel, dit_accel.kernels.block_sparse as b; print(dit_accel.__file__); print(b.__file__)"
    files = inside(installed, "python", "-c", code).split()
    assert len(files) == 2
    assert all(str(installed[0].parent) in file for file in files)


def test_everything_travels(installed: tuple[Path, Path]) -> None:
    code = (
        "import dit_accel, importlib, pathlib\n"
        "from dit_accel.sparsity.crossover import table; assert table()\n"
        "for room in ('kernels.merge', 'pipelines.cli', 'eval.bench_crossover', 'eval.cli'):\n"
        "    importlib.import_module('dit_accel.' + room)\n"
        "home = pathlib.Path(dit_accel.__file__).parent\n"
        "assert (home / 'py.typed').exists() and (home / 'eval' / 'report.html.j2').exists()\n"
        "print(dit_accel.demo_model('emoji-flux'))"
    )
    model = Path(inside(installed, "python", "-c", code).strip())
    assert (model / "model_index.json").is_file()
    assert str(installed[0].parent) in str(model)


def test_the_command_line_answers(installed: tuple[Path, Path]) -> None:
    said = inside(installed, "dit-accel", "--help")
    assert "generate" in said
    assert "eval" in said  # registered by eval/, which pipelines/ must not know


def test_hugging_face_kernels_still_imports(installed: tuple[Path, Path]) -> None:
    code = "from kernels import get_kernel; import dit_accel.kernels.block_sparse; print('both')"
    assert inside(installed, "python", "-c", code).strip() == "both"


def test_nothing_foreign_is_installed(installed: tuple[Path, Path]) -> None:
    """The wheel owns dit_accel/ alone: no top-level kernels/, pipelines/, eval/ or tests/."""
    (site,) = (installed[0].parent / "lib").glob("python*/site-packages")
    tools = ("pip", "setuptools", "_", "pkg_", "wheel", "distutils-precedence")
    ours = {p.name for p in site.iterdir() if not p.name.startswith(tools)}
    assert {name for name in ours if not name.endswith(".dist-info")} == {"dit_accel"}
