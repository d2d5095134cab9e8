"""One case of the step benchmark on one device: the model, its inputs, and the clocks on its blocks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.config import Recipe
from dit_accel.eval.step_cases import Case, built
from dit_accel.eval.step_clock import AttentionClock, StepTime, Stopwatch, extrapolate

STEPS = 1000  # of the pretended run; far more than are taken, so that no new run begins


class Bench:
    """One case on one device: the model, its inputs, and the clocks on its blocks."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        self.case, self.device, self.repeats = case, device, repeats
        self.model: Any = built(case, device, dtype)
        self.inputs = case.inputs(device, dtype)
        self.watch = Stopwatch(device)
        self.backends: list[SDPBackend] | None = None
        self._clock: AttentionClock | None = None
        self._clock_blocks()

    @property
    def site(self) -> Any:
        """The first attention module a recipe may speak for."""
        block = getattr(self.model, next(iter(self.case.groups)))[0]
        return block.attn1 if hasattr(block, "attn1") else block.attn

    def _clock_blocks(self) -> None:
        """Time every block from outside of what torch may compile of it: no clock can stand in compiled code."""
        for name in self.case.groups:
            for block in getattr(self.model, name):
                block._compiled_call_impl = self._clocked(name, block._compiled_call_impl or block._call_impl)

    def _clocked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self._clock is not None:
                self._clock.kind = name
            with self.watch.span(name):
                return call(*args, **kwargs)

        return clocked

    @contextmanager
    def compiled(self, backend: str) -> Iterator[None]:
        """Run the repeated blocks compiled, as diffusers' own method does it, inside the `with` block."""
        torch.compiler.reset()
        self.model.compile_repeated_blocks(fullgraph=True, backend=backend)
        self._clock_blocks()
        try:
            yield
        finally:
            for module in self.model.modules():
                module._compiled_call_impl = None
            self._clock_blocks()
            torch.compiler.reset()

    def forward(self) -> None:
        """Run the transformer once under the chosen attention backends."""
        with self.chosen_backends(), self.watch.span("forward"):
            self.model(**self.inputs, return_dict=False)

    def chosen_backends(self) -> Any:
        """Make torch's attention use the backends that stock was found to run with."""
        return nullcontext() if self.backends is None else sdpa_kernel(self.backends, set_priority=True)

    def choose_backends(self) -> str:
        """Take cuDNN's attention alone where the whole model runs with it, else first of several; say which."""
        if self.device.type != "cuda":
            return "torch's default"
        self.backends = [SDPBackend.CUDNN_ATTENTION]
        try:
            self.forward()
        except RuntimeError as error:
            print(f"{self.case.name}: cuDNN alone does not run this model ({str(error).splitlines()[0]})", flush=True)
            self.backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            self.forward()
        return ", then ".join(backend.name.split("_")[0].lower() for backend in self.backends)

    def timed(self, before: Callable[[int], None] | None = None) -> StepTime:
        """Run once to warm up and then `repeats` times; return the medians, scaled to the full depth.

        Raises RuntimeError when compiled code is compiled again after the first of these runs.
        """
        for index in range(self.repeats + 1):
            if before is not None:
                before(index)
            with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
                self.forward()
            if index == 0:
                self.watch.read()
        return extrapolate(self.watch.read(), self.case.groups, self.case.layers)

    def timed_stock(self, tokens: int) -> StepTime:
        """Time the stock model, and in it the attentions over all `tokens`."""
        self._clock = AttentionClock(self.watch, tokens)
        with self._clock:
            try:
                return self.timed()
            finally:
                self._clock = None

    def first_layer(self) -> torch.Tensor:
        """Return what the first attention gives the picture or video tokens, [B, S, C]."""
        seen: list[Any] = []
        hook = self.site.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            self.forward()
        finally:
            hook.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    def median_ms(self, call: Callable[[], Any]) -> float:
        """Time a call alone: the median of `repeats` runs after one to warm up."""
        for index in range(self.repeats + 1):
            with self.watch.span("call"):
                call()
            if index == 0:
                self.watch.read()
        return statistics.median(self.watch.read()["call"])


def all_pairs(recipe: Recipe) -> Recipe:
    """Return a recipe whose plans hold all pairs, in the blocks of the one given."""
    score, select = {"kind": "pooled", "weigh": True}, {"kind": "top-p", "p": 1.0, "least": 1.0}
    return recipe.override(score=score, select=select, name="all pairs")
