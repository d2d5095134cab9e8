"""Muon for the matrices and AdamW for the rest, over flat buffers.

All parameters live in one buffer of working weights (bf16 on a GPU) with fp32 masters, one gradient buffer
(so that one all-reduce serves all) and one buffer of averaged weights. The matrices (of a transformer's blocks,
or a VAE's kernels) come first, grouped by shape, so that a view of the buffer is the batch Muon works on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from parallel import Group
from torch import nn

SLOW = 0.2  # of AdamW's rate, for the parameters that are named slow


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, side by side in the flat buffers."""

    start: int
    shape: tuple[int, int, int]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        count, rows, columns = self.shape
        return flat[self.start : self.start + count * rows * columns].view(self.shape)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration toward the nearest orthogonal matrices, batched."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.mT if tall else x


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The matrices Muon trains; they are also the ones that ship in fp8."""
    return parameter.ndim == 2 and "blocks." in name


def is_kernel(_: str, parameter: nn.Parameter) -> bool:
    """A convolution's kernel; Muon sees it as the matrix from all its inputs to its outputs."""
    return parameter.ndim in (4, 5) and parameter.shape[0] > 1


class Optimizer:
    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        muon_rate: float = 2e-3,
        adam_rate: float = 1.5e-3,
        is_matrix: Callable[[str, nn.Parameter], bool] = is_block_matrix,
        is_slow: Callable[[str], bool] = lambda _: False,
    ):
        named = list(model.named_parameters())
        matrices = sorted(((p.shape[0], p[0].numel()), n, p) for n, p in named if is_matrix(n, p))
        rest = [(n, p) for n, p in named if not is_matrix(n, p)]
        self.names = [(n, p.shape) for _, n, p in matrices] + [(n, p.shape) for n, p in rest]
        parameters = [p for _, _, p in matrices] + [p for _, p in rest]
        self.master = torch.cat([p.detach().float().flatten() for p in parameters])
        self.work = self.master.to(dtype)
        self.gradient = torch.zeros_like(self.work)
        self.average = self.master.clone()
        self.first_moment = torch.zeros_like(self.master)
        self.stacks, self.split = self._stacks([s for s, _, _ in matrices])
        self.second_moment = torch.zeros_like(self.master[self.split :])
        pace = [torch.full((p.numel(),), SLOW if is_slow(n) else 1.0) for n, p in rest]
        self.pace = torch.cat(pace).to(self.master.device)
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        self.steps = 0
        self._point_at_buffers(parameters)

    @staticmethod
    def _stacks(shapes: list[tuple[int, int]]) -> tuple[list[Stack], int]:
        stacks, start = [], 0
        for (rows, columns), same in groupby(shapes):
            stack = Stack(start, (len(list(same)), rows, columns))
            stacks.append(stack)
            start += stack.shape[0] * rows * columns
        return stacks, start

    def _point_at_buffers(self, parameters: list[nn.Parameter]) -> None:
        start = 0
        for p in parameters:
            p.data = self.work[start : start + p.numel()].view(p.shape)
            p.grad = self.gradient[start : start + p.numel()].view(p.shape)
            start += p.numel()

    @torch.no_grad()
    def step(self, group: Group, rate: float, quantise: bool, average_decay: float = 0.998) -> None:
        """Apply and clear the gradients. `rate` scales both learning rates."""
        group.average_(self.gradient)
        self.gradient.nan_to_num_(0, 0, 0)  # one bad sample must not end the run
        self.steps += 1
        self._muon(rate * self.muon_rate)
        self._adam(rate * self.adam_rate)
        self.average.lerp_(self.master, 1 - min(average_decay, self.steps / (10 + self.steps)))
        self.gradient.zero_()
        self.refresh(quantise)

    def _muon(self, rate: float, momentum: float = 0.95) -> None:
        for stack in self.stacks:
            gradient = stack.view(self.gradient).float()
            moment = stack.view(self.first_moment)
            moment.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(moment, momentum))
            rows, columns = stack.shape[1:]
            stack.view(self.master).add_(update, alpha=-rate * max(1, rows / columns) ** 0.5)

    def _adam(self, rate: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        gradient, moment = self.gradient[self.split :].float(), self.first_moment[self.split :]
        moment.lerp_(gradient, 1 - betas[0])
        self.second_moment.lerp_(gradient.square(), 1 - betas[1])
        first = moment / (1 - betas[0] ** self.steps)
        second = self.second_moment / (1 - betas[1] ** self.steps)
        self.master[self.split :].addcdiv_(first * self.pace, second.sqrt() + 1e-8, value=-rate)

    @torch.no_grad()
    def refresh(self, quantise: bool) -> None:
        """Working weights from the masters; with `quantise` the matrices are rounded as they will ship."""
        self.work.copy_(self.master)
        if quantise:
            self.work[: self.split].copy_(self.master[: self.split].to(torch.float8_e4m3fn))

    def state(self) -> dict[str, torch.Tensor | int]:
        keys = ("master", "average", "first_moment", "second_moment", "steps")
        return {k: getattr(self, k) for k in keys}

    def load_state(self, state: dict[str, torch.Tensor | int]) -> None:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                getattr(self, key).copy_(value)
        self.steps = state["steps"]
        self.refresh(quantise=False)

    def averaged(self) -> dict[str, torch.Tensor]:
        """Averaged weights by parameter name."""
        return self._by_name(self.average)

    def load_averaged(self, weights: dict[str, torch.Tensor]) -> None:
        """Go on from averaged weights; the moments start anew. Words new since then keep their first values."""
        for name, view in self._by_name(self.master).items():
            view[: len(weights[name])].copy_(weights[name])
        self.average.copy_(self.master)
        self.refresh(quantise=False)

    def _by_name(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        result, start = {}, 0
        for name, shape in self.names:
            result[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return result
