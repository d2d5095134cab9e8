"""The door of the operation: checks and choice of the back end."""

from __future__ import annotations

from torch import Tensor

from dit_accel.kernels.choice import Backend, dtype_reasons, takes_triton


def blend(out: Tensor, kept: Tensor, rest: Tensor, unit: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return out · kept + rest, with the numbers of each token's unit.

    Args:
        out: [B, S, H, D], fp16, bf16 or fp32 (the reference takes fp64 too), any strides.
        kept, rest: float32 [B, H, U] and [B, H, U, D].
        unit: int64 [B|1, H|1, S], from 0 to U - 1; not checked: that would stall the device.
        backend: None takes Triton on CUDA where it can run, else the reference; a name is obeyed.

    Returns:
        [B, S, H, D] in out's dtype, computed in fp32.

    Raises:
        ValueError: shapes or a back end that do not fit; RuntimeError: the named back end cannot run this.
    """
    b, s, h, d = out.shape
    units = kept.shape[-1]
    leads = unit.dim() == 3 and unit.shape[0] in (1, b) and unit.shape[1] in (1, h) and unit.shape[2] == s
    if tuple(kept.shape) != (b, h, units) or tuple(rest.shape) != (b, h, units, d) or not leads:
        raise ValueError(
            f"out is {list(out.shape)}, kept {list(kept.shape)}, rest {list(rest.shape)}, unit {list(unit.shape)}; "
            "expected [B, S, H, D], [B, H, U], [B, H, U, D] and [B|1, H|1, S]"
        )
    if takes_triton(backend, "blend out {}", _triton_reasons, out) and out.numel():
        from .triton import run
    else:
        from .reference import run
    return run(out, kept, rest, unit)


def _triton_reasons(out: Tensor) -> list[str]:
    from dit_accel.kernels.block_sparse import triton

    return triton.runs_on(out.device, out.dtype) + dtype_reasons(out)
