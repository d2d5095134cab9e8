"""Which kernel backend runs the sparse calls."""

from __future__ import annotations

from functools import lru_cache

import torch

from .kernels.block_sparse import Precision, automatic, unsupported_reasons


@lru_cache(maxsize=256)
def kernel_name(
    device: torch.device, dtype: torch.dtype, head_dim: int, precision: Precision = "as given"
) -> tuple[str, str]:
    """Return which backend runs sparse calls on such tensors, and why it is not the fast one ('' if it is)."""
    suffix = "" if precision == "as given" else f" {precision}"
    if device.type == "cpu":
        return "cpu" + suffix, "the Triton kernels run on CUDA devices, this is cpu"
    why: list[str] = []
    for name in automatic(device, precision):
        reasons = unsupported_reasons(name, device=device, dtype=dtype, head_dim=head_dim, precision=precision)
        if not reasons:
            return name + suffix, "; ".join(why)
        why += reasons
    return "none" + suffix, "; ".join(why)
