"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, dtype_reasons, takes_triton

from .op import merge_op

MOST_BRANCHES = 4  # of the Triton kernel


def merge_attention(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets, from the results over each of them.

    Args:
        outs: [B, S, H, D] each, one floating dtype: softmax-weighted values over one key set.
        lses: [B, H, S] each, float32: natural logarithm of that key set's sum of exp(logits).
        backend: None takes Triton for up to four branches on CUDA and the reference elsewhere.

    Returns:
        out [B, S, H, D] in the outs' dtype and lse [B, H, S]. A branch whose lse is -inf has no say, whatever
        its out holds; where all are -inf, out is 0 and lse -inf.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end
        cannot run this, or a gradient is needed.

    out = sum_i exp(lse_i - lse) out_i with lse = ln sum_i exp(lse_i) (FlashAttention, Dao et al. 2022,
    arXiv 2205.14135).
    """
    if torch.compiler.is_compiling():
        return merge_op(list(outs), list(lses), backend)
    _check(outs, lses)
    if takes_triton(backend, "merge", _triton_reasons, outs[0], len(outs)) and outs[0].numel():
        from .triton import merge
    else:
        from .reference import merge
    return merge(outs, lses)


def _triton_reasons(out: Tensor, branches: int) -> list[str]:
    from . import triton

    reasons = triton.runs_on(out.device)
    if branches > MOST_BRANCHES:
        reasons.append(f"{branches} branches are more than {MOST_BRANCHES}")
    return reasons + dtype_reasons(out)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"{len(outs)} outs and {len(lses)} lses; expected as many of each, at least one")
    shape, dtype, device = outs[0].shape, outs[0].dtype, outs[0].device
    if len(shape) != 4:
        raise ValueError(f"outs[0] is {list(shape)}; expected [B, S, H, D]")
    batch, length, heads, _ = shape
    for at, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape or tuple(lse.shape) != (batch, heads, length):
            raise ValueError(
                f"outs[{at}] is {list(out.shape)}, lses[{at}] {list(lse.shape)}; "
                f"expected {list(shape)} and {[batch, heads, length]}"
            )
        if out.dtype != dtype or not dtype.is_floating_point or lse.dtype != torch.float32:
            raise TypeError(f"outs[{at}] is {out.dtype}, lses[{at}] {lse.dtype}; expected {dtype} and torch.float32")
        if out.device != device or lse.device != device:
            raise ValueError(f"outs[{at}] lies on {out.device}, lses[{at}] on {lse.device}; expected {device}")
        if torch.is_grad_enabled() and (out.requires_grad or lse.requires_grad):
            raise RuntimeError(
                f"outs[{at}] {list(shape)}: a gradient is asked for, but this operation has no backward "
                "pass; call it under torch.no_grad() or detach its inputs"
            )
