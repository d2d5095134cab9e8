"""Which kernel backend runs the sparse calls."""

from __future__ import annotations

from functools import lru_cache

import torch

from .kernels.block_sparse import unsupported_reasons


@lru_cache(maxsize=256)
def kernel_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return which backend runs sparse calls on such tensors, and why it is not the fast one ('' if it is)."""
    if device.type != "cuda":
        name = "cpu" if device.type == "cpu" else "reference"
        return name, f"the Triton kernels run on CUDA devices, this is {device.type}"
    reasons = unsupported_reasons("triton", device=device, dtype=dtype, head_dim=head_dim)
    return ("reference", "; ".join(reasons)) if reasons else ("triton", "")
