"""The step is read from the scheduler, whatever kind it is and wherever it begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dit_accel.step import StepTracker

MODEL = torch.nn.Identity()
SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
]


class Pipe(SimpleNamespace):
    """A pipeline as far as the tracker looks."""

    __hash__ = object.__hash__


def loop(pipe: Any, tracker: StepTracker, begin: int = 0, calls: int = 1, stop: int | None = None) -> list[Any]:
    seen = []
    sample = torch.ones(1, 4)
    for i, t in enumerate(pipe.scheduler.timesteps[begin:]):
        if i == stop:
            break
        seen += [tracker.observe(MODEL, t.expand(1)) for _ in range(calls)]
        sample = pipe.scheduler.step(torch.zeros(1, 4), t, sample).prev_sample
    return seen


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_every_scheduler(cls: Any) -> None:
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    for steps in (4, 6):
        pipe.scheduler.set_timesteps(steps)
        seen = loop(pipe, tracker, calls=2)
        total = len(pipe.scheduler.timesteps)
        assert [s.index for s in seen] == [i for i in range(total) for _ in range(2)]
        assert [s.branch for s in seen] == ["0", "1"] * total
        assert {s.total for s in seen} == {total}
    assert tracker.run == 2


def noise_level(scheduler: Any, t: torch.Tensor) -> float:
    """Ask the scheduler itself how it mixes a picture of ones with noise of ones, each without the other."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    if hasattr(scheduler, "scale_noise"):  # flow: the share of noise
        return float(scheduler.scale_noise(zero, t[None], one))
    return float(scheduler.add_noise(zero, one, t[None]) / scheduler.add_noise(one, zero, t[None]))


@pytest.mark.parametrize("cls", [DDIMScheduler, CogVideoXDDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_sigma_is_the_noise_that_the_scheduler_adds(cls: Any) -> None:
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    for steps in (4, 6):
        pipe.scheduler.set_timesteps(steps)
        seen = [step.sigma for step in loop(pipe, tracker)]
        assert seen == pytest.approx([noise_level(pipe.scheduler, t) for t in pipe.scheduler.timesteps], rel=1e-4)
        assert seen == sorted(seen, reverse=True)


def test_sigma_is_what_euler_calls_it_on_the_same_model() -> None:
    tracked = []
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = Pipe(scheduler=cls(timestep_spacing="trailing"))
        pipe.scheduler.set_timesteps(5)
        tracked.append([step.sigma for step in loop(pipe, StepTracker(pipe))])
    assert tracked[0] == pytest.approx(tracked[1], rel=1e-4)


def test_a_run_that_begins_in_the_middle() -> None:
    """Image-to-image sets a begin index; its first step is step 0 of fewer."""
    pipe = Pipe(scheduler=FlowMatchEulerDiscreteScheduler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(8)
    pipe.scheduler.set_begin_index(3)
    seen = loop(pipe, tracker, begin=3)
    assert [s.index for s in seen] == list(range(5))
    assert {s.total for s in seen} == {5}
    assert [s.sigma for s in seen] == pipe.scheduler.sigmas[3:8].tolist()


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_after_a_cancelled_run(cls: Any) -> None:
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(5)
    loop(pipe, tracker, stop=2)
    pipe.scheduler.set_timesteps(5)
    seen = loop(pipe, tracker)
    assert seen[0].index == 0
    assert {s.run for s in seen} == {2}


def test_a_swapped_scheduler_is_followed() -> None:
    pipe = Pipe(scheduler=DDIMScheduler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(3)
    loop(pipe, tracker)
    pipe.scheduler = EulerDiscreteScheduler()
    pipe.scheduler.set_timesteps(4)
    assert [s.index for s in loop(pipe, tracker)] == [0, 1, 2, 3]


def test_without_a_scheduler_the_step_is_unknown_with_the_reason() -> None:
    for pipe in (None, Pipe(), Pipe(scheduler=None)):
        step = StepTracker(pipe).observe(MODEL, None)
        assert step.index is None
        assert "handle.step" in step.reason


def test_a_pipeline_that_is_gone_is_noticed() -> None:
    tracker = StepTracker(Pipe(scheduler=DDIMScheduler()))
    assert tracker.observe(MODEL, None).index is None


def test_timesteps_of_their_own_for_each_token() -> None:
    """Wan 2.2 5B: the tokens of a given first frame stand at 0, all others at the step's timestep."""
    pipe = Pipe(scheduler=DDIMScheduler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(4)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert [tracker.observe(MODEL, mask * t).index for t in pipe.scheduler.timesteps] == [0, 1, 2, 3]


def test_own_loop_starts_a_new_run_when_the_index_falls_back() -> None:
    tracker = StepTracker(None)
    runs = []
    for index in (0, 1, 2, 0, 1):
        tracker.set_manual(index, 3, None)
        runs.append((tracker.observe(MODEL, None).run, tracker.observe(MODEL, None).branch))
    assert runs == [(1, "1"), (1, "1"), (1, "1"), (2, "1"), (2, "1")]


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_a_scheduler_that_was_never_set_knows_no_step(cls: Any) -> None:
    """As of a pipeline whose transformer runs in another pipeline's loop."""
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    for _ in range(3):
        info = tracker.observe(MODEL, torch.tensor([500.0]))
        assert (info.index, info.total) == (None, None)
        assert info.reason.startswith("no step known: the pipeline's scheduler has not been set to any steps")


@pytest.mark.parametrize("cls", [c for c in SCHEDULERS if c is not DDIMScheduler], ids=lambda c: c.__name__)
def test_a_scheduler_at_its_end_knows_no_step(cls: Any) -> None:
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(3)
    loop(pipe, tracker)
    info = tracker.observe(MODEL, torch.tensor([500.0]))
    assert (info.index, info.total) == (None, None)
    assert info.reason.startswith("no step known: the pipeline's scheduler has no step left")
    pipe.scheduler.set_timesteps(3)
    assert [s.index for s in loop(pipe, tracker, stop=2)] == [0, 1]


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_an_own_loop_gives_way_to_the_pipelines(cls: Any) -> None:
    pipe = Pipe(scheduler=cls())
    tracker = StepTracker(pipe)
    for index in range(2):
        tracker.set_manual(index, 5, "cond")
        seen = [tracker.observe(MODEL, None) for _ in range(2)]
        assert [(s.index, s.total, s.branch) for s in seen] == [(index, 5, "cond")] * 2
    pipe.scheduler.set_timesteps(4)
    total = len(pipe.scheduler.timesteps)
    assert [(s.index, s.total) for s in loop(pipe, tracker)] == [(i, total) for i in range(total)]


def test_an_own_loop_may_use_the_pipelines_scheduler() -> None:
    pipe = Pipe(scheduler=FlowMatchEulerDiscreteScheduler())
    tracker = StepTracker(pipe)
    pipe.scheduler.set_timesteps(4)
    sample = torch.ones(1, 4)
    for index, t in enumerate(pipe.scheduler.timesteps):
        for branch in ("cond", "uncond"):
            tracker.set_manual(10 + index, 20, branch)
            info = tracker.observe(MODEL, t.expand(1))
            assert (info.index, info.total, info.branch) == (10 + index, 20, branch)
        sample = pipe.scheduler.step(torch.zeros(1, 4), t, sample).prev_sample
