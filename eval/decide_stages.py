"""Watch the stages of planned attention calls: which one runs, what it launches, and how long it takes.

The stages are functions of the engine that are wrapped while a `with` block lasts. Nested ones count for themselves, so
that the stages of a call add up to the call.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STAGES = ("order", "score", "select", "plan", "correct", "gather", "kernel", "merge", "fill", "report")
DECISION = ("order", "score", "select", "plan", "correct")  # what a plan costs beside its own attention

# where each stage begins; what lies in none of them is not counted
FUNCTIONS = {
    "dit_accel.sparsity.planner:decide": "select",
    "dit_accel.sparsity.decide:_cut": "order",
    "dit_accel.sparsity.decide:_worth": "score",
    "dit_accel.sparsity.error:per_cost": "score",
    "dit_accel.sparsity.rows:unit_mass": "score",
    "dit_accel.sparsity.trust:divergence": "score",
    "dit_accel.sparsity.heads:_losses": "score",
    "dit_accel.sparsity.planner:from_units": "plan",
    "dit_accel.sparsity.planner:exact_plan": "plan",
    "dit_accel.sparsity.plan:PackedPlan.pack": "plan",
    "dit_accel.sparsity.plan:PackedPlan.expand": "plan",
    "dit_accel.sparsity.planner:corrected": "correct",
    "dit_accel.sparsity.planner:residual": "correct",
    "dit_accel.sparsity.correct:PooledBranch.run": "correct",
    "dit_accel.sparsity.correct:Blend.apply": "correct",
    "dit_accel.sparsity.correct:Delta.apply": "correct",
    "dit_accel.sparsity.correct:Residual.apply": "correct",
    "dit_accel.sparsity.plan:block_sparse_attention": "kernel",
    "dit_accel.sparsity.agents:Agents.run": "kernel",
    "dit_accel.kernels.block_sparse.triton:_pack": "gather",
    "dit_accel.kernels.block_sparse.triton:_outputs": "fill",
    "dit_accel.attend:merge_attention": "merge",
    "dit_accel.sparsity.plan:Plan.density": "report",
}

HOST_ONLY = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
)
RUN = ("_assign_kernel", "_lists_kernel")  # they compute places in other tensors; of the rest any values will do
KERNELS = sorted(path.parent.name for path in (Path(__file__).parents[1] / "kernels").glob("*/triton.py"))


@contextmanager
def staged(change: Callable[[str], None]) -> Iterator[None]:
    """Call `change` with the name of a stage whenever one begins or is taken up again; "" is none."""
    running = [""]

    def wrapped(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            running.append(stage)
            change(stage)
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                change(running[-1])

        return run

    with ExitStack() as stack:
        for where, stage in FUNCTIONS.items():
            module, _, path = where.partition(":")
            owner: Any = import_module(module)
            *classes, name = path.split(".")
            for part in classes:
                owner = getattr(owner, part)
            made: Any = wrapped(getattr(owner, name), stage)
            if isinstance(vars(owner)[name], classmethod):
                made = staticmethod(made)  # it is bound already
            stack.enter_context(patch.object(owner, name, made))
        yield


# Counting ----------------------------------------------------------------------------------------------------------
class Launches(TorchDispatchMode):
    """Count by stage what a GPU would be given to do: torch's operations that are no views, and Triton's kernels.

    Most kernels are counted and not run, so what a counted call returns means nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_stage: dict[str, Counter[str]] = defaultdict(Counter)
        self.stage = ""
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not (self._paused or func.is_view or name in HOST_ONLY):
            self.by_stage[self.stage][name] += 1
        return func(*args, **(kwargs or {}))

    def total(self, *stages: str) -> int:
        """Return how many there were, in some stages or in all."""
        return sum(sum(counts.values()) for stage, counts in self.by_stage.items() if not stages or stage in stages)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs inside the `with` block."""

        def change(stage: str) -> None:
            self.stage = stage

        with ExitStack() as stack:
            for folder in KERNELS:
                module = import_module(f"dit_accel.kernels.{folder}.triton")
                for name, kernel in list(vars(module).items()):
                    if name.endswith("_kernel"):
                        stack.enter_context(patch.object(module, name, _Counted(kernel, name, self)))
            stack.enter_context(staged(change))
            stack.enter_context(self)
            yield

    @contextmanager
    def launching(self, name: str) -> Iterator[None]:
        """Count a kernel, and nothing of what Triton's interpreter does to run it."""
        self.by_stage[self.stage][f"triton {name.strip('_')}"] += 1
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


class _Counted:
    """A Triton kernel that says when it would be launched."""

    def __init__(self, kernel: Any, name: str, launches: Launches) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            with self._launches.launching(self._name):
                return self._kernel[grid](*args, **kwargs) if self._name in RUN else None

        return launch


# Timing ------------------------------------------------------------------------------------------------------------
class Clock:
    """Time the stages of one call by the host's clock and, on a GPU, by events.

    With `ahead`, the GPU first sleeps so many cycles: everything is launched before anything runs, and the events tell
    what the GPU itself needs. Without, they tell what passes when each operation waits for its launch.
    """

    def __init__(self, device: torch.device, ahead: int = 0) -> None:
        self._cuda, self._ahead = device.type == "cuda", ahead
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []

    def _mark(self, stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True) if self._cuda else None
        if event is not None:
            event.record()
        self._marks.append((stage, time.perf_counter() * 1e3, event))

    def run(self, call: Callable[[], Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Run a call; return the ms of each stage on the host, and on the device (without one, the same)."""
        self._marks = []
        if self._cuda:
            torch.cuda.synchronize()
        if self._ahead:
            torch.cuda._sleep(self._ahead)
        with staged(self._mark):
            self._mark("")
            call()
            self._mark("")
        if self._cuda:
            torch.cuda.synchronize()
        host: dict[str, float] = defaultdict(float)
        device: dict[str, float] = defaultdict(float)
        for (stage, start, begun), (_, end, ended) in zip(self._marks, self._marks[1:], strict=False):
            host[stage] += end - start
            device[stage] += begun.elapsed_time(ended) if begun is not None and ended is not None else end - start
        return host, device
