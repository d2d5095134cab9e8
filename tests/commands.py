"""What the tests of the command line share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from typer.testing import Result

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def error_of(result: Result) -> str:
    """Return the error line of a failed command, and check its form."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return lines[0]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
