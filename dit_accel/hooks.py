"""Forward hooks that torch.compile leaves alone; importing this brings torch's compiler along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A forward hook that a deep copy of the model does not take along: the copy is not accelerated.

    It stays plain Python when the whole transformer is compiled, because what it reads is new at every step.
    """

    def __init__(self, call: Callable[..., None] | None) -> None:
        self._call = call

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, _: Any) -> Hook:
        return Hook(None)

    def __reduce__(self) -> Any:
        return Hook, (None,)
