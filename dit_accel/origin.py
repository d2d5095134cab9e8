"""What a kept value was computed from, and whether that is still so: identity and writes, without reading a device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_TRUSTED = ("torch.nn.", "diffusers.")  # modules that compute from their arguments and weights alone


@dataclass(frozen=True, eq=False)
class Origin:
    """The tensors a value is computed from. `unseen` says why a change of them could go unnoticed, '' if none could."""

    tensors: tuple[torch.Tensor, ...] = ()
    unseen: str = ""

    def through(self, *modules: torch.nn.Module | None) -> Origin:
        """Add the weights of modules that the value passes through; None is skipped."""
        tensors, unseen = list(self.tensors), self.unseen
        for part in _parts(modules):
            unseen = unseen or hidden_state(part)
            tensors += [t for own in (part._parameters, part._buffers) for t in own.values() if t is not None]
        return Origin(tuple(tensors), unseen)


class Unchanged:
    """Remember tensors as they are now, without keeping them alive.

    A tensor is unchanged when it is the same object and nothing was written to it: autograd's version counter counts
    every write, through views too, except those through `.data`. Tensors made in inference mode have no counter and
    count as changed.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._marks = [(weakref.ref(t), _version(t)) for t in tensors]

    def holds_for(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Say whether these are the remembered tensors, unchanged."""
        return len(tensors) == len(self._marks) and all(
            ref() is t and version is not None and version == _version(t)
            for (ref, version), t in zip(self._marks, tensors, strict=True)
        )


def _version(tensor: torch.Tensor) -> tuple[int, torch.dtype] | None:
    return None if tensor.is_inference() else (tensor._version, tensor.dtype)


def _parts(modules: Sequence[torch.nn.Module | None]) -> Iterator[torch.nn.Module]:
    for module in modules:
        if module is not None:  # most are single layers, and this runs in every cross-attention
            yield from module.modules() if module._modules else (module,)


def hidden_state(module: torch.nn.Module) -> str:
    """Say what about a module could change its result unseen: an adapter's scale, a hook, a replaced forward."""
    cls = type(module)
    if not cls.__module__.startswith(_TRUSTED):
        return f"a {cls.__module__}.{cls.__name__} is on the way"
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return f"a {cls.__name__} on the way carries a hook"
    return ""
