"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dit_accel.kernels.choice import head_reasons, wants_triton, why_not_triton
from dit_accel.kernels.merge import merge_attention

from .op import pooled_op

Backend = Literal["triton", "cpu", "reference"]
WHOLE = 64  # groups: what tiles of them are whole numbers of


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    computed: Tensor,
    row: Tensor,
    scale: float,
    *,
    first: int = 0,
    into: tuple[Tensor, Tensor] | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the pooled keys of the groups that its row has not computed token by token.

    Args:
        q: [B, S, H, D], any strides.
        k, v: floating [B, H, C or more, D], the mean keys and values of C groups of tokens; what lies behind them is
            finite and counts for nothing. In q's dtype, contiguous and `WHOLE` groups at a time they need no copy.
        bias: float32 [B|1, H|1, C], added to a group's logit: the logarithm of the tokens that it stands for, so that a
            group of equal tokens weighs what its tokens would, -inf for none.
        computed: bool [B|1, H|1, R, columns], or the same as bits, uint8 [B|1, H|1, R, columns / 8], the lowest first.
        row: int64 [B|1, H|1, S], each query's row of `computed`; its range is not checked: that would stall the device.
        scale: factor of the logits.
        first: the column of `computed` that is group 0's; the others follow.
        into: out [B, S, H, D] in q's dtype and lse float32 [B, H, S] of attention to other keys; the result is that
            over both.
        backend: None takes Triton on CUDA where it can run, "cpu" on a CPU, else the reference; a name is obeyed. All
            but the reference round mean keys and values to q's dtype.

    Returns:
        out [B, S, H, D] in q's dtype and lse float32 [B, H, S]. A query with no group of tokens left has out 0 and
        lse -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; RuntimeError: the named back end cannot run
        this, or a gradient is needed.

    The centroid branch of SVG-EAR (arXiv 2603.08982); also RetroInfer's estimation zone (arXiv 2505.02922).
    """
    if torch.compiler.is_compiling():
        return pooled_op(q, k, v, bias, computed, row, scale, first, *(into or (None, None)), backend)
    _check(q, k, v, bias, computed, row, first)
    _check_into(q, into)
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend is {backend!r}; known are {str(get_args(Backend))[1:-1]} and None (automatic)")
    wanted = backend or ("triton" if wants_triton(q) else "cpu" if q.device.type == "cpu" else "reference")
    reasons = unsupported_reasons(wanted, q)
    if backend is not None and reasons:
        raise RuntimeError(f"backend {backend!r} cannot attend with q {list(q.shape)}: {'; '.join(reasons)}")
    if wanted == "triton" and not reasons and q.numel() and bias.shape[2]:
        from .triton import attend

        return attend(q, k, v, bias, computed, row, scale, first, into)
    if wanted == "cpu" and not reasons and q.numel() and bias.shape[2]:
        from .cpu import attend
    else:
        from .reference import attend
    out, lse = attend(q, k, v, bias, computed, row, scale, first)
    return (out, lse) if into is None else merge_attention((into[0], out), (into[1], lse))


def unsupported_reasons(backend: Backend, q: Tensor) -> list[str]:
    """Why a back end cannot take such queries; an empty list when it can."""
    if backend == "reference":
        return []
    if backend == "cpu":
        return [] if q.device.type == "cpu" else [f"the tensors lie on {q.device}"]
    return why_not_triton(_triton_reasons, q)


def _triton_reasons(q: Tensor) -> list[str]:
    from . import triton

    return triton.runs_on(q.device, q.dtype) + head_reasons(q)


def _check_into(q: Tensor, into: tuple[Tensor, Tensor] | None) -> None:
    if into is None:
        return
    out, lse = into
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise ValueError(
            f"into holds {list(out.shape)} {out.dtype} on {out.device}; expected q's {list(q.shape)} {q.dtype}"
        )
    if (lse.shape, lse.dtype, lse.device) != (wanted, torch.float32, q.device):
        raise ValueError(f"into holds lse {list(lse.shape)} {lse.dtype}; expected float32 {list(wanted)} on {q.device}")


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, computed: Tensor, row: Tensor, first: int) -> None:
    if q.dim() != 4 or k.dim() != 4 or computed.dim() != 4:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, computed {list(computed.shape)}; expected four axes of each"
        )
    b, s, h, d = q.shape
    c = bias.shape[-1]
    for name, tensor in (("k", k), ("v", v)):
        if (*tensor.shape[:2], tensor.shape[3]) != (b, h, d) or tensor.shape[2] < c:
            wanted = f"[{b}, {h}, {c} or more, {d}]"
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {wanted} for q {list(q.shape)}")
    for name, tensor, last in (("bias", bias, (c,)), ("computed", computed, computed.shape[2:]), ("row", row, (s,))):
        if tensor.shape[0] not in (1, b) or tensor.shape[1] not in (1, h) or tuple(tensor.shape[2:]) != tuple(last):
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{b}|1, {h}|1, {str(list(last))[1:-1]}]")
    if computed.dtype not in (torch.bool, torch.uint8) or row.dtype != torch.int64 or bias.dtype != torch.float32:
        raise TypeError(
            f"computed is {computed.dtype}, row {row.dtype}, bias {bias.dtype}; expected torch.bool or torch.uint8, "
            "torch.int64 and torch.float32"
        )
    columns = computed.shape[3] * (8 if computed.dtype == torch.uint8 else 1)
    if not 0 <= first <= columns - c:
        raise ValueError(f"first is {first}; expected 0 to {columns - c}, for {c} groups in {columns} columns")
    for name, tensor in (("k", k), ("v", v), ("bias", bias), ("computed", computed), ("row", row)):
        if tensor.device != q.device:
            raise ValueError(f"{name} lies on {tensor.device}, q on {q.device}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            f"q {list(q.shape)}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )
