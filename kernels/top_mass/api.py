"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.budget.api import check_map, uses_triton
from dit_accel.kernels.choice import Backend

from .op import mass_op


def top_mass(
    score: Tensor, keep: Tensor, p: float, least: float | Tensor = 0.0, *, backend: Backend | None = None
) -> Tensor:
    """Take in each row the best pairs until they hold `p` of the row's score, the crossing one included.

    Args:
        score: float32 [B, H, R, C], of equal ones the first ranks higher. What is negative counts as 0, what is not
            finite too, and is always taken.
        keep: bool, broadcastable to the scores: always taken.
        p: the share of the row's score.
        least: the share of the columns, rounded down, that is taken at least; one number, or float64
            [B|1, H|1, R|1, 1].
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        bool [B, H, R, C]. Where the share before a pair is `p` up to rounding, the back ends may differ in that pair.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this.

    The selection of XAttention (Xu et al. 2025, arXiv 2503.16428) and others, after top-p sampling.
    """
    if torch.compiler.is_compiling():
        one, many = (0.0, least) if isinstance(least, Tensor) else (least, None)
        return mass_op(score, keep, p, one, many, backend)
    check_map(score, keep)
    if isinstance(least, Tensor) and (least.dtype != torch.float64 or least.dim() != 4 or least.shape[3] != 1):
        raise ValueError(f"least is {list(least.shape)} {least.dtype}; expected float64 [B|1, H|1, R|1, 1]")
    if uses_triton(score, backend):
        from .triton import rows
    else:
        from .reference import rows
    return rows(score, keep, p, least)
