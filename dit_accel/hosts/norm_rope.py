"""From projected to rotated queries and keys: through the family's own norms and rotation, or in one fused pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..kernels.choice import wants_triton
from ..kernels.qk_norm_rope import Norm, Part, qk_norm_rope, unsupported_reasons
from ..origin import hidden_state

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Rotary = tuple[torch.Tensor, torch.Tensor] | None
Tables = Callable[[tuple[torch.Tensor, torch.Tensor], int], tuple[torch.Tensor, torch.Tensor, int]]


class Rotate(Protocol):
    """A family's rotation of queries or keys [B, S, H, D], rounding as stock does."""

    def __call__(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor: ...


@dataclass(frozen=True)
class Rotation:
    """A family's rotation: as it computes it itself, and as `qk_norm_rope` wants it told.

    `tables(rotary, tokens)` gives cos and sin of neighbouring channels, by channel or pair, and the first token they
    rotate. `partly`: other tokens are left as they are, else the tables must have a row for each.
    """

    turn: Rotate
    tables: Tables
    partly: bool = False


@dataclass(frozen=True, eq=False)
class Projected:
    """Tokens that were projected together: q, k, v [B, S, H, D], and the modules that normalise q and k (None: none).

    `across_heads`: the norms take all heads of a token as one vector.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm_q: Any
    norm_k: Any
    across_heads: bool = False


def from_the_first(rotary: tuple[torch.Tensor, torch.Tensor], _: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rotate as many tokens as the tables [R, D] have rows, the first ones."""
    return *rotary, 0


def normalised(parts: Sequence[Projected]) -> QKV:
    """Run the modules themselves and join the parts: q, k, v [B, S, H, D], unrotated."""
    done = [(_through(part.norm_q, part.q, part), _through(part.norm_k, part.k, part), part.v) for part in parts]
    if len(done) == 1:
        return done[0]
    q, k, v = (torch.cat(same, 1) for same in zip(*done, strict=True))
    return q, k, v


def _through(norm: Any, x: torch.Tensor, part: Projected) -> torch.Tensor:
    if norm is None:
        return x
    return norm(x.flatten(2)).unflatten(2, x.shape[2:]) if part.across_heads else norm(x)


def fused(parts: Sequence[Projected], rotation: Rotation, rotary: Rotary) -> QKV | None:
    """Normalise, rotate and join in one pass over memory; None where only the modules can tell what they do.

    That is: off CUDA; norms of other classes than torch's RMSNorm and LayerNorm and diffusers' RMSNorm, adapters among
    them; hooks; weights of another dtype or device; gradients; autocast; tables that are not float32. Stock rounds
    where `qk_norm_rope` does, so the two differ by the order in which float32 sums are taken.
    """
    first = parts[0].q
    if not wants_triton(first) or (not first.is_meta and torch.is_autocast_enabled(first.device.type)):
        return None
    norm = _common(parts)
    if norm is None or unsupported_reasons("triton", first, norm):
        return None
    given = [
        Part(part.q, part.k, part.norm_q.weight, part.norm_k.weight, _bias(part.norm_q), _bias(part.norm_k))
        for part in parts
    ]
    if not all(_plain(x, first) for part in given for x in _tensors(part)):
        return None
    tokens = sum(part.q.shape[1] for part in parts)
    cos, sin, start = (None, None, 0) if rotary is None else rotation.tables(rotary, tokens)
    for table in (cos, sin):
        if table is not None and not _fits(table, first, tokens - start, rotation.partly):
            return None
    q, k = qk_norm_rope(given, norm, cos, sin, start=start, backend="triton")
    return q, k, parts[0].v if len(parts) == 1 else torch.cat([part.v for part in parts], 1)


def _common(parts: Sequence[Projected]) -> Norm | None:
    """Say what all norms of a call do; None where they differ or one is not known."""
    norms = {_read(module, part) for part in parts for module in (part.norm_q, part.norm_k)}
    return norms.pop() if len(norms) == 1 else None


def _read(module: Any, part: Projected) -> Norm | None:
    """Say what a norm does, None where its class, its shape or a hook on it leaves that open."""
    from diffusers.models.normalization import RMSNorm

    cls = type(module)
    if cls not in (torch.nn.RMSNorm, torch.nn.LayerNorm, RMSNorm) or hidden_state(module) or module.eps is None:
        return None
    shape = module.dim if cls is RMSNorm else module.normalized_shape
    heads, dim = part.q.shape[2:]
    if tuple(shape) != (heads * dim if part.across_heads else dim,):
        return None
    kind = "layer" if cls is torch.nn.LayerNorm else "rms"
    return Norm(kind, module.eps, part.across_heads, rounds_first=cls is RMSNorm)


def _bias(module: Any) -> torch.Tensor | None:
    return getattr(module, "bias", None)  # torch's RMSNorm has none


def _tensors(part: Part) -> Iterator[torch.Tensor]:
    every = (part.q, part.k, part.q_weight, part.k_weight, part.q_bias, part.k_bias)
    yield from (x for x in every if x is not None)


def _plain(x: torch.Tensor, like: torch.Tensor) -> bool:
    """Say whether a tensor is torch's own, of this dtype and device, and needs no gradient."""
    own = type(x) in (torch.Tensor, torch.nn.Parameter) and (x.dtype, x.device) == (like.dtype, like.device)
    return own and not (torch.is_grad_enabled() and x.requires_grad)


def _fits(table: torch.Tensor, q: torch.Tensor, room: int, partly: bool) -> bool:
    """Say whether a table [R, D] or [R, D / 2] is one for such queries; where not, stock says what is wrong."""
    return (
        (table.dtype, table.device) == (torch.float32, q.device)
        and table.dim() == 2
        and table.shape[1] in (q.shape[3], q.shape[3] // 2)
        and (table.shape[0] <= room if partly else table.shape[0] == room)
    )
