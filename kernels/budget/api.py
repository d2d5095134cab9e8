"""The doors of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, takes_triton

from .op import heads_op, rows_op

WIDEST = 8192  # columns of a row that the Triton kernel holds in registers


def fill_rows(
    score: Tensor, keep: Tensor, cost: Tensor, budget: float | Tensor, *, backend: Backend | None = None
) -> Tensor:
    """Take in each row the best pairs, while at least half of each still fits into the row's budget.

    Args:
        score: float32 [B, H, R, C], higher is better, of equal ones the first. What is not finite is always taken.
        keep: bool, broadcastable to the scores: always taken, and counted first, as what is not finite is.
        cost: float32 [C] or [B|1, H|1, C], not negative; whole numbers that sum to less than 2**24 add up exactly.
        budget: a share of the row's whole cost, or float32 [B|1, H|1, R|1, 1] in the units of the cost.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        bool [B, H, R, C]. The best pair of a row is always taken. Both back ends agree on every pair where costs add
        up exactly.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this.

    Top-k selection of blocks; the limit is found bit by bit of the scores (radix selection), so nothing is sorted.
    """
    if torch.compiler.is_compiling():
        share, given = (budget, None) if isinstance(budget, float) else (0.0, budget)
        return rows_op(score, keep, cost, share, given, backend)
    _check(score, keep, {"cost": cost})
    if isinstance(budget, Tensor) and not (budget.dim() == 4 and budget.shape[3] == 1):
        raise ValueError(f"budget is {list(budget.shape)}; expected [B|1, H|1, R|1, 1]")
    if uses_triton(score, backend):
        from .triton import rows
    else:
        from .reference import rows
    return rows(score, keep, cost, budget)


def fill_heads(
    score: Tensor, keep: Tensor, row_cost: Tensor, col_cost: Tensor, share: float, *, backend: Backend | None = None
) -> Tensor:
    """Take in each head the best pairs over all its rows, while at least half of each still fits into `share`.

    As `fill_rows`, but a pair costs its row's times its column's cost, [R] and [C] or [B|1, H|1, ...], the budget is a
    share of all of a head's pairs, and a row's best pair is taken only where the row would be empty. Whole costs are
    added exactly by Triton, and by the reference up to 2**24.

    DraftAttention, Shen et al. 2025, arXiv 2505.14708, cuts by such a percentile of a head.
    """
    if torch.compiler.is_compiling():
        return heads_op(score, keep, row_cost, col_cost, share, backend)
    _check(score, keep, {"row_cost": row_cost, "col_cost": col_cost})
    if uses_triton(score, backend):
        from .triton import heads
    else:
        from .reference import heads
    return heads(score, keep, row_cost, col_cost, share)


def _triton_reasons(score: Tensor) -> list[str]:
    from . import triton

    reasons = triton.runs_on(score.device)
    if score.shape[3] > WIDEST:
        reasons.append(f"{score.shape[3]} columns are more than {WIDEST}")
    return reasons


def uses_triton(score: Tensor, backend: Backend | None) -> bool:
    """Whether a map of scores is ranked in Triton; raises where a named back end cannot."""
    return takes_triton(backend, "rank {}", _triton_reasons, score) and score.numel() > 0


def check_map(score: Tensor, keep: Tensor) -> None:
    """Raise where scores are no map, or what is kept does not belong to it."""
    if score.dim() != 4 or score.dtype != torch.float32:
        raise ValueError(f"score is {list(score.shape)} {score.dtype}; expected float32 [B, H, R, C]")
    if keep.dtype != torch.bool:
        raise TypeError(f"keep is {keep.dtype}; expected torch.bool")
    pairs = zip(reversed(keep.shape), reversed(score.shape), strict=False)
    if keep.dim() > 4 or not all(own in (1, other) for own, other in pairs):
        raise ValueError(f"keep is {list(keep.shape)}; expected to broadcast to {list(score.shape)}")


def _check(score: Tensor, keep: Tensor, costs: dict[str, Tensor]) -> None:
    check_map(score, keep)
    for name, cost in costs.items():
        axis = 2 if name == "row_cost" else 3
        lead = tuple(cost.shape[:-1])
        fits = lead == () or (len(lead) == 2 and all(n in (1, m) for n, m in zip(lead, score.shape[:2], strict=True)))
        if not fits or cost.shape[-1] != score.shape[axis]:
            raise ValueError(f"{name} is {list(cost.shape)}; expected [{score.shape[axis]}], or with B|1, H|1 in front")
        if cost.dtype != torch.float32:
            raise TypeError(f"{name} is {cost.dtype}; expected torch.float32")
