"""The merge in Triton: every branch is read once."""

# Triton's language is not Python's: pyright cannot follow constexprs and launches
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_accel.kernels.sizes import power_of_two

INTERPRETED = triton.knobs.runtime.interpret


def runs_on(device: torch.device) -> list[str]:
    """Why the kernel cannot run on this device; an empty list when it can."""
    if device.type == "cuda" or INTERPRETED:
        return []
    return [f"device {device} is not CUDA (set TRITON_INTERPRET=1 before Triton is imported to interpret)"]


@triton.jit
def _add_branch(acc, total, top, out_ptr, lse_ptr, at, lse_at, row_ok, mask):
    """Add one branch to the running softmax over branches."""
    lse = tl.load(lse_ptr + lse_at, mask=row_ok, other=float("-inf"))  # [ROWS]
    out = tl.load(out_ptr + at, mask=mask & (lse > float("-inf"))[:, None], other=0.0)  # [ROWS, D_PAD]
    new_top = tl.maximum(top, lse)
    # a row that has seen no key yet keeps top = -inf: subtract 0 there, since -inf - -inf is NaN
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay, weight = tl.exp(top - shift), tl.exp(lse - shift)
    return acc * decay[:, None] + out.to(tl.float32) * weight[:, None], total * decay + weight, new_top


@triton.jit
def _merge_kernel(
    out_0, out_1, out_2, out_3, lse_0, lse_1, lse_2, lse_3, out_ptr, lse_ptr, rows, length, heads,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = sum_i exp(lse_i - lse) out_i, lse = ln sum_i exp(lse_i), for ROWS rows of [B * S * H, D]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    h, s, b = row % heads, (row // heads) % length, row // heads // length
    lse_at = (b * heads + h) * length + s
    d = tl.arange(0, D_PAD)
    at = row[:, None] * D + d[None, :]
    mask = row_ok[:, None] & (d < D)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    acc, total, top = _add_branch(acc, total, top, out_0, lse_0, at, lse_at, row_ok, mask)
    if out_1 is not None:
        acc, total, top = _add_branch(acc, total, top, out_1, lse_1, at, lse_at, row_ok, mask)
    if out_2 is not None:
        acc, total, top = _add_branch(acc, total, top, out_2, lse_2, at, lse_at, row_ok, mask)
    if out_3 is not None:
        acc, total, top = _add_branch(acc, total, top, out_3, lse_3, at, lse_at, row_ok, mask)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + lse_at, top + tl.log(total), mask=row_ok)


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Run the kernel on checked, non-empty branches, four at most."""
    batch, length, heads, dim = outs[0].shape
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=out.device)
    padded, rows = power_of_two(dim), batch * length * heads
    per_program = max(1, 4096 // padded)
    branches = [[x.contiguous() for x in xs] + [None] * (4 - len(xs)) for xs in (outs, lses)]
    with torch.cuda.device_of(out):
        _merge_kernel[(-(-rows // per_program),)](
            *branches[0], *branches[1], out, lse, rows, length, heads,
            D=dim, D_PAD=padded, ROWS=per_program, num_warps=4,
        )  # fmt: skip
    return out, lse
