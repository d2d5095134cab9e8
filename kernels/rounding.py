"""Rounding inside a kernel where stock code rounds between its operations."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x to the nearest number of the dtype, ties to even, as fp32."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off instead
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype).to(tl.float32)
