"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dit_accel.kernels.choice import wants_triton

from .op import pooled_op

Backend = Literal["triton", "cpu", "reference"]


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    allowed: Tensor,
    row: Tensor,
    scale: float,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over the pooled keys that its row of `allowed` names.

    Args:
        q: [B, S, H, D], any strides.
        k, v: [B, H, C, D], the mean keys and values of C groups of tokens.
        tokens: [B|1, H|1, C], how many tokens each group stands for; its logit gains their logarithm, so that a group
            of equal tokens weighs what its tokens would.
        allowed: bool [B|1, H|1, R, C].
        row: int64 [B|1, H|1, S], each query's row of `allowed`; its range is not checked: that would stall the device.
        scale: factor of the logits.
        backend: None takes Triton on CUDA where it can run, "cpu" on a CPU, else the reference; a name is obeyed. All
            but the reference round mean keys and values to q's dtype.

    Returns:
        out [B, S, H, D] in q's dtype and lse float32 [B, H, S]. A query with no allowed group of tokens has out 0 and
        lse -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; RuntimeError: the named back end cannot run
        this, or a gradient is needed.

    The centroid branch of SVG-EAR (arXiv 2603.08982); also RetroInfer's estimation zone (arXiv 2505.02922).
    """
    if torch.compiler.is_compiling():
        return pooled_op(q, k, v, tokens, allowed, row, scale, backend)
    _check(q, k, v, tokens, allowed, row)
    if backend not in (None, *get_args(Backend)):
        raise ValueError(f"backend is {backend!r}; known are {str(get_args(Backend))[1:-1]} and None (automatic)")
    wanted = backend or ("triton" if wants_triton(q) else "cpu" if q.device.type == "cpu" else "reference")
    reasons = unsupported_reasons(wanted, q)
    if backend is not None and reasons:
        raise RuntimeError(f"backend {backend!r} cannot attend with q {list(q.shape)}: {'; '.join(reasons)}")
    if wanted == "triton" and not reasons and q.numel() and k.shape[2]:
        from .triton import attend
    elif wanted == "cpu" and not reasons and q.numel() and k.shape[2]:
        from .cpu import attend
    else:
        from .reference import attend
    return attend(q, k, v, tokens, allowed, row, scale)


def unsupported_reasons(backend: Backend, q: Tensor) -> list[str]:
    """Why a back end cannot take such queries; an empty list when it can."""
    if backend == "reference":
        return []
    if backend == "cpu":
        return [] if q.device.type == "cpu" else [f"the tensors lie on {q.device}"]
    try:
        from .triton import runs_on
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]
    reasons = runs_on(q.device, q.dtype)
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype} is not fp16, bf16 or fp32")
    if not 16 <= q.shape[3] <= 256:
        reasons.append(f"head dim {q.shape[3]} is not within 16..256")
    return reasons


def _check(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or allowed.dim() != 4:
        raise ValueError(
            f"q is {list(q.shape)}, k {list(k.shape)}, allowed {list(allowed.shape)}; expected four axes of each"
        )
    b, s, h, d = q.shape
    c, r = k.shape[2], allowed.shape[2]
    for name, tensor, shape in (("k", k, (b, h, c, d)), ("v", v, (b, h, c, d))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)} for q {list(q.shape)}")
    for name, tensor, last in (("tokens", tokens, (c,)), ("allowed", allowed, (r, c)), ("row", row, (s,))):
        if tensor.shape[0] not in (1, b) or tensor.shape[1] not in (1, h) or tuple(tensor.shape[2:]) != last:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{b}|1, {h}|1, {str(list(last))[1:-1]}]")
    if allowed.dtype != torch.bool or row.dtype != torch.int64:
        raise TypeError(f"allowed is {allowed.dtype}, row {row.dtype}; expected torch.bool and torch.int64")
    for name, tensor in (("k", k), ("v", v), ("tokens", tokens), ("allowed", allowed), ("row", row)):
        if tensor.device != q.device:
            raise ValueError(f"{name} lies on {tensor.device}, q on {q.device}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            f"q {list(q.shape)}: a gradient is asked for, but this operation has no backward pass; "
            "call it under torch.no_grad() or detach its inputs"
        )
