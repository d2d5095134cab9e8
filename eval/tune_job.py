"""What `dit-accel tune-kernels` does around the measuring: where the table lies, progress, what is kept and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dit_accel.errors import ConfigError, UnsupportedError, nearest
from dit_accel.eval.tune_cases import CASES, Case, takes_other_kernel
from dit_accel.eval.tune_kernels import DeadDeviceError, Outcome, gpu_clock, screen_table, table_of, tune_all
from dit_accel.kernels.block_sparse import tuned
from dit_accel.pipelines.cli import print_json
from dit_accel.pipelines.screen import complain, screen


@dataclass(frozen=True)
class TuneJob:
    """One asked-for tuning: seconds in all, names of cases (none: all), and a file other than the GPU's own."""

    seconds: float
    names: Sequence[str]
    out: Path | None

    def __post_init__(self) -> None:
        known = [case.name for case in CASES]
        for name in self.names:
            if name not in known:
                raise ConfigError(f"case: none is called {name!r}.{nearest(name, known)}")

    def cases(self, device: torch.device) -> list[Case]:
        """Return the asked calls that take tiles from a table on this device; UnsupportedError where none does."""
        asked = [case for case in CASES if not self.names or case.name in self.names]
        found = [case for case in asked if not takes_other_kernel(case, device)]
        if not found:
            raise UnsupportedError(
                "all of these calls run on the Hopper kernel here, which takes no tiles from a table."
            )
        return found

    def reset(self) -> None:
        """Remove the table, whatever it holds."""
        path = self.out or tuned.path(tuned.gpu_name(_device()))
        there = path.is_file()
        path.unlink(missing_ok=True)
        tuned.forget()
        print(f"{path}: {'removed' if there else 'there is none'}; the committed tiles are used")

    def run(self, as_json: bool) -> None:
        """Tune, write after each case, and show old beside new; an interrupt keeps what was found."""
        device = _device()
        cases, gpu, outcomes = self.cases(device), tuned.gpu_name(device), []
        path = self.out or tuned.path(gpu)
        old = tuned.read(path)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=screen(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(cases))

            def said(what: str) -> None:
                progress.update(task, description=what)

            try:
                for one in tune_all(cases, device, self.seconds, gpu_clock, said):
                    outcomes.append(one)
                    progress.advance(task)
                    tuned.write(table_of(outcomes, old, device), path)
            except (KeyboardInterrupt, DeadDeviceError) as stop:
                complain(f"stopped, {len(outcomes)} cases are kept: {stop or 'interrupted'}")
        tuned.forget()
        if as_json:
            print_json({"output": str(path), "gpu": gpu, "cases": [_plain(one) for one in outcomes]})
        left = len(cases) - len(outcomes)
        shown = screen(stderr=as_json)
        shown.print(screen_table(outcomes, gpu))
        shown.print(f"{path}{f'; {left} cases were not reached' if left else ''}", soft_wrap=True, highlight=False)


def _plain(one: Outcome) -> dict[str, object]:
    """Put an outcome in JSON's terms; what is not known is null."""
    plain = {**asdict(one), "case": one.case.name, "better": one.better}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in plain.items()}


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise UnsupportedError("tune-kernels measures a GPU, and there is no CUDA device here.")
    return torch.device("cuda", torch.cuda.current_device())
