"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_mass.api import check_units, uses_triton
from dit_accel.kernels.choice import Backend

from .op import max_op


def block_max(
    q: Tensor,
    k: Tensor,
    q_slots: Tensor,
    k_slots: Tensor,
    unit: int,
    scale: float,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the largest logit between any token of a query unit and any of a key unit.

    Args: as in `block_mass`; `scale` above 0; `q_bias`, `k_bias` float32 [B, H, S], what each query and each key adds
        to its logits, both or none.

    Returns:
        float32 [B, H, query units, key units]; -inf where a unit holds no token. A token that is not finite makes the
        pairs of its unit not finite.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    What Double Sparsity (Yang et al. 2024, arXiv 2408.07092) ranks tokens by and SALE (Ji et al. 2025, arXiv
    2505.24179) blocks, here for units.
    """
    if torch.compiler.is_compiling():
        return max_op(q, k, q_slots, k_slots, unit, scale, q_bias, k_bias, backend)
    check_units(q, k, q_slots, k_slots, unit)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected above 0")
    biases = None if q_bias is None or k_bias is None else (q_bias, k_bias)
    _check_biases(q, q_bias, k_bias)
    if uses_triton(q, q_slots, k_slots, backend):
        from .triton import largest
    else:
        from .reference import largest
    return largest(q, k, q_slots, k_slots, unit, scale, biases)


def _check_biases(q: Tensor, *biases: Tensor | None) -> None:
    shape = (q.shape[0], q.shape[2], q.shape[1])
    wrong = [x for x in biases if x is not None and (tuple(x.shape) != shape or x.dtype != torch.float32)]
    if wrong or len({x is None for x in biases}) > 1:
        said = ", ".join("None" if x is None else f"{list(x.shape)} {x.dtype}" for x in biases)
        raise ValueError(f"q_bias and k_bias are {said}; expected both float32 {list(shape)}, or none")
