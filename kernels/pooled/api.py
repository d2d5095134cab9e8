"""The door of the operation: checks."""

from __future__ import annotations

from torch import Tensor

from .reference import attend


def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, allowed: Tensor, row: Tensor, scale: float
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

    Returns:
        out [B, S, H, D] in q's dtype and lse float32 [B, H, S]. A query with no allowed group of tokens has out 0 and
        lse -inf.

    Raises:
        ValueError: shapes that do not fit.

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
    return attend(q, k, v, tokens, allowed, row, scale)
