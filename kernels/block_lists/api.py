"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.choice import Backend, takes_triton

from .op import lists_op


class BlockLists(NamedTuple):
    """What `block_lists` returns, with Bx and Hx the largest batch and heads among its arguments.

    `index` int32 [Bx, Hx, Nq, Nk]: each query block's key blocks, full ones first, both kinds ascending; what lies
    behind the used ones is 0. `count`, `full_count` int32 [Bx, Hx, Nq]: how many are used, and how many of them are
    full. `pairs` int64 [Bx, Hx, Nq]: the token pairs they hold.
    """

    index: Tensor
    count: Tensor
    full_count: Tensor
    pairs: Tensor


def block_lists(
    units: Tensor,
    q_owner: Tensor,
    k_owner: Tensor,
    q_tokens: Tensor,
    k_tokens: Tensor,
    block_k: int,
    *,
    backend: Backend | None = None,
) -> BlockLists:
    """List for each query block the key blocks that its unit computes.

    A *unit* is what is decided about, and owns whole blocks; a block holds tokens and perhaps holes. Blocks without
    tokens are not listed, and those without holes are *full*.

    Args:
        units: which unit pairs are computed, bool [B|1, H|1, query units, key units]; or the same as bits, uint8
            [B|1, H|1, query units, ceil(key units / 8)], the first unit in the lowest bit.
        q_owner, k_owner: int64 [B|1, H|1, Nq] and [B|1, H|1, Nk], the unit each block belongs to, which is not checked
            here: it would stall the device.
        q_tokens, k_tokens: int64, of the same shapes, the tokens in each block.
        block_k: slots of a key block.
        backend: None takes Triton on CUDA and the reference elsewhere; a name is obeyed.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; RuntimeError: the named back end cannot run
        this.

    Every block-sparse method needs such lists; MInference (Jiang et al. 2024, arXiv 2407.02490) makes them in a kernel.
    """
    if torch.compiler.is_compiling():
        return BlockLists(*lists_op(units, q_owner, k_owner, q_tokens, k_tokens, block_k, backend))
    _check(units, q_owner, k_owner, q_tokens, k_tokens, block_k)
    if takes_triton(backend, "list units {}", _triton_reasons, units):
        from .triton import lists
    else:
        from .reference import lists
    return BlockLists(*lists(units, q_owner, k_owner, q_tokens, k_tokens, block_k))


def _triton_reasons(units: Tensor) -> list[str]:
    from . import triton

    return triton.runs_on(units.device)


def _check(units: Tensor, q_owner: Tensor, k_owner: Tensor, q_tokens: Tensor, k_tokens: Tensor, block_k: int) -> None:
    if units.dim() != 4:
        raise ValueError(f"units is {list(units.shape)}; expected [B|1, H|1, query units, key units]")
    if units.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"units is {units.dtype}; expected torch.bool, or torch.uint8 for bits")
    if block_k < 1:
        raise ValueError(f"block_k is {block_k}; expected at least 1")
    sides = {"q_owner": q_owner, "k_owner": k_owner, "q_tokens": q_tokens, "k_tokens": k_tokens}
    for name, tensor in sides.items():
        if tensor.dim() != 3:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected [B|1, H|1, blocks]")
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; expected torch.int64")
        if tensor.device != units.device:
            raise ValueError(f"{name} lies on {tensor.device}, units on {units.device}")
    for owner, tokens in (("q_owner", "q_tokens"), ("k_owner", "k_tokens")):
        if sides[owner].shape != sides[tokens].shape:
            raise ValueError(
                f"{owner} is {list(sides[owner].shape)}, {tokens} {list(sides[tokens].shape)}; expected them alike"
            )
    for axis, what in ((0, "batch"), (1, "heads")):
        sizes = {tensor.shape[axis] for tensor in (units, q_owner, k_owner)} - {1}
        if len(sizes) > 1:
            raise ValueError(f"units, q_owner and k_owner differ in {what}: {sorted(sizes)}")
