"""What the commands share: the console, and errors as one clear line on stderr with exit code 2."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dit_accel.errors import DitAccelError

FAILED, INTERRUPTED = 2, 130
PIPE_WIDTH = 120


class OneLineErrors(TyperGroup):
    """A command group that turns whatever its commands raise into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **more: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(given, *rest, standalone_mode=False, **more)
        except Exception as error:
            if "--debug" in given or os.environ.get("DIT_ACCEL_DEBUG") == "1":
                traceback.print_exc()
            complain(explain(error))
            code = FAILED
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # here and not in main(), because what the layers between make of it varies
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def screen(stderr: bool = False) -> Console:
    """Return a console; a pipe or a file, which has no width, is taken to be wide enough for our tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)


def complain(message: str) -> None:
    """Print an error as one line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)


def explain(error: Exception) -> str:
    """Say what went wrong in words for the person at the keyboard."""
    if isinstance(error, DitAccelError):
        return str(error)
    if _is_out_of_memory(error):
        return "out of memory; try a smaller --height and --width, --dtype bf16, or a machine with more memory."
    if hasattr(error, "format_message"):  # a wrong option, which the command line parser found
        return error.format_message()
    first = next(iter(str(error).strip().splitlines()), "no message")
    return f"{type(error).__name__}: {first} (--debug shows where)"


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # what torch says on a CPU
