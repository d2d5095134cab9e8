"""The step benchmark's second half: the same steps with the repeated blocks compiled, stock and accelerated.

Blocks are compiled one kind at a time by diffusers' own `compile_repeated_blocks(fullgraph=True)`; a graph break or a
second compilation of timed code is an error. Stock's attention inside compiled code cannot be timed, so Amdahl's bound
takes the eager one, which is the same kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel import accelerate
from dit_accel.config import Recipe
from dit_accel.eval.step_clock import StepTime
from dit_accel.eval.step_model import STEPS, Bench, all_pairs

WORST_ERROR = 3e-2  # queries and keys are rounded elsewhere than in eager bf16; a wrong rotation is far above


@dataclass(frozen=True)
class Compiled:
    """A step with compiled blocks. Times in ms of the full depth, `bound` is Amdahl's over compiled stock.

    `error`: relative, of the first attention over all pairs, compiled against eager. `backend` compiled it.
    """

    stock_step_ms: float
    step_ms: float
    density: float
    speedup: float
    bound: float
    error: float
    backend: str


def compiled_steps(bench: Bench, recipes: Sequence[Recipe], stock: StepTime, backend: str) -> Iterator[Compiled]:
    """Check and time a case with compiled blocks, once for each recipe; `stock` is the eager stock step.

    Raises RuntimeError where the model does not compile as one graph, compiles again, or gives another result.
    """
    eager = first_answer(bench, all_pairs(recipes[0]))
    with bench.compiled(backend):
        dense = bench.timed().step
        ours = first_answer(bench, all_pairs(recipes[0]))
        error = float((ours - eager).norm() / eager.norm())
        if not error < WORST_ERROR:
            raise RuntimeError(f"{bench.case.name}: relative error {error} of the first attention when compiled")
        for recipe in recipes:
            with accelerate(bench.model, recipe) as handle:
                timed = bench.timed(lambda index, handle=handle: handle.step(index, STEPS, "cond")).step
                density = handle.report().density
            bound = dense / (dense - stock.attention * (1 - density))
            yield Compiled(dense, timed, density, dense / timed, bound, error, backend)


def first_answer(bench: Bench, recipe: Recipe) -> torch.Tensor:
    """Return what the first sparse attention of a step gives, [B, S, H, D], fp32."""
    seen: list[torch.Tensor] = []

    def keep(call: Any, plan: Any, out: torch.Tensor) -> None:
        if not seen:
            seen.append(out.float())

    with accelerate(bench.model, recipe) as handle:
        handle.watchers = (keep,)
        handle.step(0, STEPS, "cond")
        bench.forward()
    return seen[0]
