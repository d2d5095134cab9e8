"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, dtype_reasons, takes_triton, why_not_triton
from dit_accel.kernels.sizes import power_of_two

from .op import norm_rope_op

LARGEST = 16_384  # numbers of one token that a program holds in registers


@dataclass(frozen=True, eq=False)
class Part:
    """Queries and keys [B, S, H, D] that were projected together, any strides, and the weights of their norms.

    Weights and biases are [D], or [H * D] where a norm spans all heads; None multiplies by one and adds nothing.
    """

    q: Tensor
    k: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """How each query and key is normalised: by its root mean square, or to mean 0 and variance 1 ("layer").

    `across_heads` takes the H * D numbers of a token as one vector, else each head is one. `rounds_first` rounds to
    the tensors' dtype before the weight, after it and after the bias, as diffusers' RMSNorm does; torch's norms round
    once.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    across_heads: bool = False
    rounds_first: bool = False


def qk_norm_rope(
    parts: Sequence[Part],
    norm: Norm,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    start: int = 0,
    interleaved: bool = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate queries and keys, and lay the parts one behind the other, reading and writing each once.

    Args:
        parts: one for each projection, such as text and picture; alike in batch, heads, head dim, dtype and device.
        norm: what is done to every vector before it is rounded to its dtype and rotated.
        cos, sin: float32 [R, D], or [R, D / 2] where both channels of a pair have one value; any strides. They rotate
            the tokens `start` to `start + R` of the joint sequence in float32; all others are only normalised. None
            rotates nothing.
        start: the first token that is rotated.
        interleaved: channels 2i and 2i + 1 are a pair, else i and i + D / 2.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        q and k [B, sum of S, H, D], contiguous, in the dtype of the parts: x cos + turn(x) sin, where turn maps a pair
        (a, b) to (-b, a).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. Rotation: Su et al. 2021, arXiv 2104.09864.
    """
    if torch.compiler.is_compiling() or (parts and parts[0].q.is_meta):  # traced, or only counted
        qs, ks = [part.q for part in parts], [part.k for part in parts]
        weights = [x for part in parts for x in (part.q_weight, part.k_weight, part.q_bias, part.k_bias)]
        how = (norm.kind, norm.eps, norm.across_heads, norm.rounds_first)
        return norm_rope_op(qs, ks, weights, *how, cos, sin, start, interleaved, backend)
    _check(parts, norm)
    _check_tables(parts, cos, sin, start)
    if takes_triton(backend, "take q {}", _triton_reasons, parts[0].q):
        from .triton import norm_rope
    else:
        from .reference import norm_rope
    return norm_rope(parts, norm, cos, sin, start, interleaved)


def unsupported_reasons(backend: Backend, q: Tensor, norm: Norm) -> list[str]:
    """Why a back end cannot take such queries [B, S, H, D]; an empty list when it can."""
    return [] if backend == "reference" else why_not_triton(_triton_reasons, q)


def _triton_reasons(q: Tensor) -> list[str]:
    from . import triton

    reasons = triton.runs_on(q.device) + dtype_reasons(q)
    held = power_of_two(q.shape[2]) * power_of_two(q.shape[3], 16)
    if held > LARGEST:
        reasons.append(f"{q.shape[2]} heads of {q.shape[3]} take {held} numbers a program, more than {LARGEST}")
    return reasons


def _check(parts: Sequence[Part], norm: Norm) -> None:
    if not parts:
        raise ValueError("parts is empty; expected at least one")
    if norm.kind not in ("rms", "layer"):
        raise ValueError(f"norm.kind is {norm.kind!r}; known are 'rms', 'layer'")
    first = parts[0].q
    if first.dim() != 4 or first.shape[3] % 2:
        raise ValueError(f"q is {list(first.shape)}; expected [B, S, H, D] with an even D")
    if not first.dtype.is_floating_point:
        raise TypeError(f"q is {first.dtype}; expected a floating dtype")
    batch, _, heads, dim = first.shape
    for at, part in enumerate(parts):
        wanted = (batch, part.q.shape[1], heads, dim)
        for name, x in (("q", part.q), ("k", part.k)):
            if tuple(x.shape) != wanted or (x.dtype, x.device) != (first.dtype, first.device):
                raise ValueError(
                    f"parts[{at}].{name} is {list(x.shape)} {x.dtype} on {x.device}; "
                    f"expected {list(wanted)} {first.dtype} on {first.device}"
                )
        for name, x in _weights(part):
            length = heads * dim if norm.across_heads else dim
            if tuple(x.shape) != (length,) or (x.dtype, x.device) != (first.dtype, first.device):
                raise ValueError(
                    f"parts[{at}].{name} is {list(x.shape)} {x.dtype} on {x.device}; "
                    f"expected [{length}] {first.dtype} on {first.device}"
                )
        for x in (part.q, part.k, *(weight for _, weight in _weights(part))):
            if torch.is_grad_enabled() and x.requires_grad:
                raise RuntimeError(
                    f"parts[{at}]: a gradient is asked for, but this operation has no backward pass; "
                    "call it under torch.no_grad() or detach its inputs"
                )


def _weights(part: Part) -> Iterator[tuple[str, Tensor]]:
    for name in ("q_weight", "k_weight", "q_bias", "k_bias"):
        if (tensor := getattr(part, name)) is not None:
            yield name, tensor


def _check_tables(parts: Sequence[Part], cos: Tensor | None, sin: Tensor | None, start: int) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"{'sin' if cos is None else 'cos'} is given alone; expected cos and sin, or neither")
    dim, device = parts[0].q.shape[3], parts[0].q.device
    total = sum(part.q.shape[1] for part in parts)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] not in (dim, dim // 2) or table.shape != cos.shape:
            raise ValueError(f"{name} is {list(table.shape)}; expected [R, {dim}] or [R, {dim // 2}], both alike")
        if table.dtype != torch.float32 or table.device != device:
            raise TypeError(f"{name} is {table.dtype} on {table.device}; expected torch.float32 on {device}")
    if start < 0 or start + cos.shape[0] > total:
        raise ValueError(f"start is {start}; {cos.shape[0]} rotated tokens from there leave the {total} given")
