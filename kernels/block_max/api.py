"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_mass.api import Backend, check_units, uses_triton

from .op import max_op


def block_max(
    q: Tensor, k: Tensor, q_slots: Tensor, k_slots: Tensor, unit: int, scale: float, *, backend: Backend | None = None
) -> Tensor:
    """Return the largest logit between any token of a query unit and any of a key unit.

    Args: as in `block_mass`; `scale` above 0.

    Returns:
        float32 [B, H, query units, key units]; -inf where a unit holds no token. A token that is not finite makes the
        pairs of its unit not finite.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError: the named back end cannot run this, or a
        gradient is needed.

    What Double Sparsity (Yang et al. 2024, arXiv 2408.07092) ranks tokens by, here for units.
    """
    if torch.compiler.is_compiling():
        return max_op(q, k, q_slots, k_slots, unit, scale, backend)
    check_units(q, k, q_slots, k_slots, unit)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; expected above 0")
    if uses_triton(q, q_slots, k_slots, backend):
        from .triton import largest
    else:
        from .reference import largest
    return largest(q, k, q_slots, k_slots, unit, scale)
