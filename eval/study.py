"""A study: the reference and every candidate on the same prompts and seeds, row by row, going on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.errors import ConfigError, DitAccelError
from dit_accel.pipelines.generate import Generation, generate_stock
from dit_accel.pipelines.media import Media
from dit_accel.pipelines.settings import Settings

from .candidates import REFERENCE, Candidate, Course
from .memory import peak_memory
from .metrics import compare
from .probe import DensityWatch, QualityWatch
from .store import DensityMap, Row, Sample, Store, open_media

Notify = Callable[[str], None]


@dataclass
class Study:
    """What is run, and where its rows go.

    Each candidate makes one untimed picture or clip before its first timed one in a process; for the first `looked`
    prompts and the first seed, one that is looked into. So no time holds a compilation, a first use or a measurement.
    Each makes as many at once as the store's setup says; the first of them is kept and compared.
    """

    pipe: Any
    settings: Settings
    candidates: Sequence[Candidate]
    prompts: Sequence[str]
    seeds: Sequence[int]
    store: Store
    looked: int = 1
    _warm: set[str] = field(default_factory=set, init=False)

    @property
    def rows(self) -> int:
        """How many rows the whole study has."""
        return (len(self.candidates) + 1) * len(self.prompts) * len(self.seeds)

    def run(self, done: Notify) -> None:
        """Make every row that is not there yet; `done` is called with its name after each. Raises ConfigError."""
        wanted = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for candidate in (REFERENCE, *self.candidates):  # all refusals before any work
            for prompt, seed in wanted:
                self.store.has(candidate.name, candidate.definition, prompt, seed)
        for prompt, seed in wanted:
            reference = self._reference(prompt, seed)
            done(REFERENCE.name)
            for candidate in self.candidates:
                if not self.store.has(candidate.name, candidate.definition, prompt, seed):
                    self._add(candidate, prompt, seed, reference)
                done(candidate.name)

    def _reference(self, prompt: str, seed: int) -> Media:
        """Return the stock picture or clip: the one on disk, else a new one with its row."""
        row = self.store.rows.get((REFERENCE.name, prompt, seed))
        if row is not None:
            media = open_media(self.store.path, row)
            if media is None:
                raise ConfigError(
                    f"{self.store.folder / str(row.media)}: the reference of a started study is gone; "
                    "name another output, or remove the rows."
                )
            return media
        made = self._measure(REFERENCE, prompt, seed, None)
        if isinstance(made, str):
            raise ConfigError(f"eval: the unaccelerated pipeline fails on {prompt!r}: {made}")
        self.store.add(made[0])
        return made[1]

    def _add(self, candidate: Candidate, prompt: str, seed: int, reference: Media) -> None:
        made = self._measure(candidate, prompt, seed, reference)
        if isinstance(made, str):
            row = Row(
                candidate=candidate.name,
                family=candidate.family,
                definition=candidate.definition,
                prompt=prompt,
                seed=seed,
                asked=candidate.asked,
                error=made,
            )
        else:
            row = made[0]
        self.store.add(row)

    def _measure(
        self, candidate: Candidate, prompt: str, seed: int, reference: Media | None
    ) -> tuple[Row, Media] | str:
        """Return the row and what it is about, or why there is none: one that fails must not stop the others."""
        settings = self.settings.model_copy(update={"seed": seed})
        try:
            with candidate.applied(self.pipe, settings) as course:
                samples = self._warm_up(candidate, course, prompt, seed)
                return self._timed(candidate, course, prompt, reference, samples)
        except (DitAccelError, RuntimeError) as error:
            return " ".join(str(error).split()) or type(error).__name__

    def _warm_up(self, candidate: Candidate, course: Course, prompt: str, seed: int) -> tuple[Sample, ...]:
        looked = prompt in self.prompts[: self.looked] and seed == self.seeds[0]
        if candidate.name in self._warm and not looked:
            return ()
        self._warm.add(candidate.name)
        watch = QualityWatch(self.store.setup.dense_steps)
        if course.handle is not None and looked:
            course.handle.watchers = (watch,)
            self._draw(course, prompt, course.settings)
        else:
            short = course.settings.model_copy(update={"steps": min(2, course.settings.steps or 2)})
            self._draw(course, prompt, short)
        return tuple(watch.samples)

    def _draw(self, course: Course, prompt: str, settings: Settings) -> Generation:
        return generate_stock(course.pipe, prompt, settings=settings, batch=self.store.setup.batch)

    def _timed(
        self, candidate: Candidate, course: Course, prompt: str, reference: Media | None, samples: tuple[Sample, ...]
    ) -> tuple[Row, Media]:
        density = DensityWatch()
        if course.handle is not None:
            course.handle.watchers = (density,)
        with peak_memory(course.pipe.device) as peak:
            made = self._draw(course, prompt, course.settings)
        seed = course.settings.seed
        row = Row(
            candidate=candidate.name,
            family=candidate.family,
            definition=candidate.definition,
            prompt=prompt,
            seed=seed,
            asked=candidate.asked,
            steps=_steps(made),
            seconds=made.seconds,
            peak_bytes=peak.bytes,
            figures=None if reference is None else compare(made.media, reference, course.pipe.device),
            samples=samples,
            media=self.store.keep(made.media, candidate.name, prompt, seed),
            fps=made.media.fps,
            frames=len(made.media.frames),
            **_done(course, density, _steps(made)),
        )
        return row, made.media


def _done(course: Course, density: DensityWatch, steps: int | None) -> dict[str, Any]:
    if course.handle is None:
        return {}
    report = course.handle.report()
    shown: DensityMap | None = density.map(course.handle, steps) if steps else None
    return {
        "density": report.density,
        "overall_density": report.overall_density,
        "state_bytes": report.state_bytes,
        "map": shown,
    }


def _steps(made: Generation) -> int | None:
    steps = made.settings.get("steps")
    return int(steps) if isinstance(steps, int) else None


def device_name(device: torch.device) -> str:
    """Name what wall times are taken on: a GPU by its name, a CPU by its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
