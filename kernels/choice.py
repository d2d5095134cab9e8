"""Which back end a door takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_preferred: ContextVar[Backend | None] = ContextVar("preferred back end", default=None)


def takes_triton(backend: Backend | None, task: str, reasons: Callable[..., list[str]], x: Tensor, *more: Any) -> bool:
    """Whether a door runs in Triton: where that is named, or wanted for `x` and nothing speaks against it.

    Args:
        backend: what the caller named.
        task: what the door does, for the error, with {} where the shape of `x` belongs.
        reasons: says of `x` and `more` why Triton cannot take them; not asked where the reference is chosen. It may
            import the kernel's `triton.py`, by `from . import triton`: twice as fast as `from .triton import ...`.

    Raises:
        ValueError: no such back end; RuntimeError: Triton is named and cannot.
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is {backend!r}; known are 'triton', 'reference' and None (automatic)")
    if backend == "reference" or (backend is None and not wants_triton(x)):
        return False
    why = why_not_triton(reasons, x, *more)
    if why and backend is not None:
        raise RuntimeError(f"backend {backend!r} cannot {task.format(list(x.shape))}: {'; '.join(why)}")
    return not why


def wants_triton(x: Tensor) -> bool:
    """Whether a call on this tensor should run in Triton, where Triton can take it."""
    preferred = _preferred.get()
    return x.is_cuda if preferred is None else preferred == "triton"


def why_not_triton(reasons: Callable[..., list[str]], *given: Any) -> list[str]:
    """Return the reasons against Triton that a function finds which imports it, or that it cannot be imported."""
    try:
        return reasons(*given)
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]


def dtype_reasons(x: Tensor) -> list[str]:
    """Why the Triton kernels cannot read such a dtype; an empty list when they can."""
    return [] if x.dtype in _FLOATS else [f"dtype {x.dtype} is not fp16, bf16 or fp32"]


def head_reasons(x: Tensor) -> list[str]:
    """Why the Triton kernels that multiply queries and keys [..., D] cannot take such; an empty list when they can."""
    reasons = dtype_reasons(x)
    if not 16 <= x.shape[-1] <= 256:
        reasons.append(f"head dim {x.shape[-1]} is not within 16..256")
    return reasons


@contextmanager
def prefer(backend: Backend) -> Iterator[None]:
    """Let all doors prefer one back end on any device, for tests and benchmarks.

    "triton" walks a GPU's path on a CPU, through Triton's interpreter; "reference" decides on a GPU as torch would.
    """
    token = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(token)
