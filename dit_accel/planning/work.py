"""Count the work of one forward on no device: FLOPs, bytes moved, the most memory held, and each attention's shape."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..call import Site
from ..hosts.generic import Intercept

_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}  # neither read nor write memory
_SECTOR = 32  # bytes that a GPU reads or writes at the least


@dataclass(frozen=True)
class Attention:
    """One scaled-dot-product attention: its sizes, and whether a mask came with it."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    masked: bool

    @property
    def flops(self) -> float:
        """FLOPs of all pairs: two products, a multiplication and an addition each."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.dim


@dataclass(frozen=True)
class Work:
    """What one forward does.

    `matmul`: FLOPs of matrix products and convolutions, and of attentions outside of the sites. `traffic`: bytes that
    all other operations read and write, each operation by itself, as eager mode runs them. `peak`: the most bytes of
    activations held at a time, inputs included. `attention`: calls by site, in the model's order.
    """

    matmul: float
    traffic: float
    peak: int
    attention: Mapping[str, tuple[Attention, ...]]

    @property
    def pairs(self) -> float:
        """FLOPs of the attentions of all sites, dense."""
        return sum(call.flops for calls in self.attention.values() for call in calls)


@torch.no_grad()
def count(model: torch.nn.Module, arguments: Mapping[str, Any], sites: Sequence[Site]) -> Work:
    """Run one forward of a model on the meta device, where nothing is computed, and count."""
    counter, attention = _Counter(arguments), {site.name: list[Attention]() for site in sites}
    inside: list[str] = []
    outside = 0.0

    def attended(call: dict[str, Any]) -> torch.Tensor:
        nonlocal outside
        seen = attention_of(call)
        if inside:
            attention[inside[-1]].append(seen)
        else:
            outside += seen.flops
        return call["query"].new_empty(*call["query"].shape[:-1], call["value"].shape[-1])

    with _inside(sites, inside), Intercept(attended), _FusedNorms(), counter:
        model(**arguments, return_dict=False)
    calls = {name: tuple(found) for name, found in attention.items()}
    return Work(counter.flops + outside, counter.traffic, counter.peak, calls)


def attention_of(call: Mapping[str, Any]) -> Attention:
    """Read the sizes of a scaled-dot-product attention from its arguments, [B, H, S, D]."""
    batch, heads, queries, dim = call["query"].shape
    return Attention(batch, heads, queries, call["key"].shape[-2], dim, call.get("attn_mask") is not None)


@contextmanager
def _inside(sites: Sequence[Site], names: list[str]) -> Iterator[None]:
    """Keep the name of the site whose module runs at the end of a list."""
    hooks = []
    for site in sites:
        hooks.append(site.module.register_forward_pre_hook(lambda *_, name=site.name: names.append(name)))
        hooks.append(site.module.register_forward_hook(lambda *_: _leave(names)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leave(names: list[str]) -> None:
    names.pop()


class _FusedNorms(TorchFunctionMode):
    """Take torch's RMS norm as the one operation that it is on a GPU; on no device it would be five."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.rms_norm, torch.rms_norm):
            return args[0].clone()  # reads and writes as much
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Add up what every operation does: FLOPs by torch's own formulas, else the bytes it reads and writes."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports triton

        super().__init__()
        self._formulas = flop_registry
        self.flops, self.traffic, self.peak = 0.0, 0.0, 0
        self._held, self._alive = 0, dict[int, weakref.ref[Any]]()
        for tensor in _tensors(list(arguments.values())):
            self._hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = list(_tensors(out))
        packet = func._overloadpacket
        if packet in self._formulas:
            self.flops += self._formulas[packet](*args, **kwargs, out_val=out)
        elif not func.is_view and packet.__name__ not in _SILENT:
            read = args[1:] if packet.__name__ == "copy_" else args
            self.traffic += sum(map(_bytes, (*_tensors(read), *_tensors(list(kwargs.values())), *made)))
        if not func.is_view:
            for tensor in made:
                self._hold(tensor)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._held += size
        self.peak = max(self.peak, self._held)

        def freed(_: Any) -> None:
            del self._alive[key]
            self._held -= size

        self._alive[key] = weakref.ref(storage, freed)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes that pass for a tensor: values expanded from fewer once, values that lie apart with what lies between."""
    spread = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and step]
    values, apart = math.prod(size for size, _ in spread), min((step for _, step in spread), default=1)
    passed = values * tensor.element_size() * min(apart, max(_SECTOR // tensor.element_size(), 1))
    return min(passed, tensor.untyped_storage().nbytes()) if tensor.numel() else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
