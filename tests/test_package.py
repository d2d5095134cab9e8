"""A wheel built from the tree works in an empty environment outside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dit_accel", "kernels", "pipelines", "eval", "examples", "tests")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that is not told of this checkout, or of another Python, by what is set for this process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**inherited, **variables}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied_tree(to: Path) -> Path:
    """Copy what a wheel is made from, links as links, and not what earlier builds left."""
    to.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build and install the wheel; return the environment's bin folder and an empty working folder.

    Built from a copy: setuptools writes into the tree, where another worker's build would meet this one's.
    """
    folder = tmp_path_factory.mktemp("wheel")
    tree = copied_tree(folder / "tree")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=tree)
    shutil.rmtree(tree)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    binaries = folder / "env" / "bin"
    run(binaries / "pip", "--isolated", "install", "--quiet", "--no-deps", wheel, cwd=folder)
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
