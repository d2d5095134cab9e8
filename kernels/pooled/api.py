"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.choice import wants_triton

Backend = Literal["triton", "reference"]


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
        row: int64 [B|1, H|1, S], each query's row of `allowed`.
        scale: factor of the logits.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed. Triton rounds the
            means to q's dtype.

    Returns:
        out [B, S, H, D] in q's dtype and lse float32 [B, H, S]. A query with no allowed group of tokens has out 0 and
        lse -inf.

    Raises:
        ValueError: shapes that do not fit; RuntimeError: the named back end cannot run this.

    The centroid branch of SVG-EAR (arXiv 2603.08982); also RetroInfer's estimation zone (arXiv 2505.02922).
    """
    b, s, h, d = q.shape
    c, r = k.shape[2], allowed.shape[2]
    for name, tensor, shape in (("k", k, (b, h, c, d)), ("v", v, (b, h, c, d))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)} for q {list(q.shape)}")
    for name, tensor, last in (("tokens", tokens, (c,)), ("allowed", allowed, (r, c)), ("row", row, (s,))):
        if tensor.shape[0] not in (1, b) or tensor.shape[1] not in (1, h) or tuple(tensor.shape[2:]) != last:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [{b}|1, {h}|1, {str(list(last))[1:-1]}]")
    if _uses_triton(q, c, backend):
        from .triton import attend
    else:
        from .reference import attend
    return attend(q, k, v, tokens, allowed, row, scale)


def _uses_triton(q: Tensor, groups: int, backend: Backend | None) -> bool:
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is {backend!r}; known are 'triton', 'reference' and None (automatic)")
    wanted = backend or ("triton" if wants_triton(q) else "reference")
    if wanted == "reference":
        return False
    reasons = _unsupported_reasons(q)
    if backend is not None and reasons:
        raise RuntimeError(f"backend {backend!r} cannot attend q {list(q.shape)}: {'; '.join(reasons)}")
    return not reasons and min(q.numel(), groups) > 0


def _unsupported_reasons(q: Tensor) -> list[str]:
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
