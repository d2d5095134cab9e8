"""What `dit-accel eval` does: check everything that can be checked, load, run the study, write the report."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dit_accel import __version__
from dit_accel.config import Recipe, build
from dit_accel.errors import ConfigError
from dit_accel.pipelines.arguments import call_arguments, makes_clips
from dit_accel.pipelines.generate import generate_stock
from dit_accel.pipelines.loading import choose_device, choose_dtype, load, locate
from dit_accel.pipelines.prompts import demo_prompts, listed_prompts
from dit_accel.pipelines.screen import screen
from dit_accel.pipelines.settings import Settings, model_defaults

from .candidates import ALL, Cached, Candidate, calibrated_candidates, fewer_steps, floors, sparse_candidates
from .report import Summary, write_report
from .rivals import caches, mag_ratios
from .shares import WHOLE, Share
from .store import Setup, Store
from .study import Notify, Study, device_name

ROWS_NEED, REPORT_NEEDS = ("torchmetrics",), ("matplotlib", "jinja2")
REPORTS, ROWS = (".html", ".htm"), ".jsonl"
CALIBRATION_SEED = 1_000_003  # none that a study is likely to judge by


@dataclass(frozen=True)
class EvalJob:
    """One study and its report, or its rows alone where `output` is their .jsonl file.

    None for recipes and prompts stands for all recipes and the demo's prompts.
    """

    output: Path
    model: str
    recipes: Sequence[str] | None
    densities: Sequence[float]
    prompts: Sequence[str] | None
    prompt_file: Path | None
    seeds: Sequence[int]
    settings: Settings
    dense_steps: float = 0.2
    dense_layers: int = 0
    rivals: bool = True
    floors: bool = True
    profiles: Sequence[Path] = ()
    dtype: str | None = None
    device: str = "auto"
    share: Share = WHOLE
    looked: int = 1
    batch: int = 1

    @property
    def rows(self) -> Path:
        """Where the rows lie."""
        return self.output.with_suffix(ROWS)

    def rebuild(self, rows: Path, markdown: Path | None = None) -> Summary:
        """Make the report of an earlier study's rows."""
        _check_output(self.output, REPORTS)
        _check_packages(REPORT_NEEDS)
        return self._report(rows, markdown)

    def run(self, markdown: Path | None = None) -> Summary:
        """Run the study, or the rest of it, and write the report; an interruption loses at most one row."""
        _check_output(self.output, (*REPORTS, ROWS))
        _check_packages(ROWS_NEED if self.output == self.rows else (*ROWS_NEED, *REPORT_NEEDS))
        self._check_numbers()
        sparse = sparse_candidates(self.recipes or [ALL], self.densities, self.dense_steps, self.dense_layers)
        sparse += calibrated_candidates(self.profiles, self.dense_steps, self.dense_layers)
        listed = listed_prompts(self.prompts, self.prompt_file)
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        source = locate(self.model)
        settings = self.settings.over(model_defaults(source))
        pipe = load(source, dtype, device)
        pipe.set_progress_bar_config(disable=True)
        prompts = listed or demo_prompts(makes_clips(type(pipe)))
        settings = _with_steps(pipe, prompts[0], settings, self.batch)
        store = Store(self.rows, self._setup(settings, dtype, device))
        others = self._others(pipe, source, settings, dtype, device, prompts[0])
        candidates = self.share.of([*sparse, *others])
        study = Study(pipe, settings, candidates, prompts, self.seeds, store, self.looked)
        with _progress(study.rows) as done:
            study.run(done)
        return self._report(self.rows, markdown)

    def _report(self, rows: Path, markdown: Path | None) -> Summary:
        summary = Summary.of(rows)
        if self.output != rows:
            write_report(summary, self.output)
        if markdown is not None:
            markdown.write_text(summary.markdown(), encoding="utf-8")
        return summary

    def _check_numbers(self) -> None:
        for density in self.densities:
            if not (math.isfinite(density) and 0 < density <= 1):
                raise ConfigError(f"density: must lie above 0 and up to 1, got {density:g}.")
        for seed in self.seeds:
            build(Settings, {"seed": seed}, "eval")
        build(Recipe, {"name": "eval", "dense_steps": self.dense_steps, "dense_layers": self.dense_layers}, "eval")

    def _setup(self, settings: Settings, dtype: torch.dtype, device: torch.device) -> Setup:
        import diffusers

        return Setup(
            model=self.model,
            settings=settings.model_dump(exclude={"seed"}, exclude_none=True),
            dtype=str(dtype).removeprefix("torch."),
            device=device_name(device),
            dense_steps=self.dense_steps,
            dense_layers=self.dense_layers,
            batch=self.batch,
            versions={"dit_accel": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        )

    def _others(
        self, pipe: Any, source: str, settings: Settings, dtype: torch.dtype, device: torch.device, prompt: str
    ) -> list[Candidate]:
        found: list[Candidate] = []
        if self.rivals:
            found += _rivals(pipe, settings, self.dense_steps, prompt)
        if self.floors:
            name = "fp32" if dtype == torch.float32 else "bf16"
            found += floors(name, lambda other: load(source, choose_dtype(other, device), device))
        return found


def _rivals(pipe: Any, settings: Settings, dense_steps: float, prompt: str) -> list[Candidate]:
    steps = settings.steps
    assert steps is not None

    def draw() -> object:
        return generate_stock(pipe, prompt, settings=settings.model_copy(update={"seed": CALIBRATION_SEED}))

    @cache
    def ratios() -> list[float]:
        return mag_ratios(pipe.transformer, steps, draw)

    rivals = caches(steps, dense_steps, ratios)
    return [*fewer_steps(steps), *(Cached(c.name, "cache", c.settings, None, c) for c in rivals)]


def _with_steps(pipe: Any, prompt: str, settings: Settings, batch: int) -> Settings:
    """Fill the pipeline's own number of steps in: shares of it are part of the study."""
    import inspect

    call_arguments(pipe, prompt, settings, batch)  # refuses what this pipeline does not take before anything runs
    if settings.steps is not None:
        return settings
    default = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    if default is None or not isinstance(default.default, int):
        raise ConfigError(f"steps: {type(pipe).__name__} has no number of its own; give one.")
    return settings.model_copy(update={"steps": default.default})


def _check_output(output: Path, suffixes: Sequence[str]) -> None:
    if output.suffix.lower() not in suffixes:
        rows = f", the rows alone a {ROWS} one" if ROWS in suffixes else ""
        raise ConfigError(f"output {output}: the report is an .html file{rows}.")
    if output.is_dir():
        raise ConfigError(f"output {output}: is a folder.")


def _check_packages(needed: Sequence[str]) -> None:
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"eval: needs {', '.join(lacking)}; install them with: pip install 'dit-accel[eval]'")


@contextmanager
def _progress(total: int) -> Iterator[Notify]:
    """Show a bar on stderr, and yield what moves it on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen(stderr=True)) as bar:
        task = bar.add_task("reference", total=total)

        def done(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield done
