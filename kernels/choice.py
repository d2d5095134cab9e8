"""Which back end a door takes when none is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

_preferred: ContextVar[Literal["triton", "reference"] | None] = ContextVar("preferred back end", default=None)


def wants_triton(x: Tensor) -> bool:
    """Whether a call on this tensor should run in Triton, where Triton can take it."""
    preferred = _preferred.get()
    return x.is_cuda if preferred is None else preferred == "triton"


@contextmanager
def prefer(backend: Literal["triton", "reference"]) -> Iterator[None]:
    """Let all doors prefer one back end on any device, for tests and benchmarks.

    "triton" walks a GPU's path on a CPU, through Triton's interpreter; "reference" decides on a GPU as torch would.
    """
    token = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(token)
