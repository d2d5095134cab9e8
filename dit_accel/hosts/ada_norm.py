"""Adaptive layer norms of a block: norm, scale and shift in one pass where the block's attention is sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..call import Site
from ..kernels.ada_norm import ada_norm, unsupported_reasons
from ..kernels.choice import wants_triton
from ..origin import hidden_state


@dataclass(frozen=True, eq=False)
class Place:
    """Where a block holds such a norm, and the site of the block's attention."""

    block: torch.nn.Module
    name: str
    module: torch.nn.Module
    site: Site


def places(transformer: torch.nn.Module, sites: Sequence[Site]) -> Iterator[Place]:
    """List the norms beside each site that `MODULATED` has an entry for."""
    for site in sites:
        block = transformer.get_submodule(site.name.removeprefix(site.model).rpartition(".")[0])
        for name, module in block.named_children():
            if type(module).__module__ == "diffusers.models.normalization" and type(module).__name__ in MODULATED:
                yield Place(block, name, module, site)


def modulate(norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return norm(x) * (1 + scale) + shift of x [B, S, C] and vectors [B, C], in one pass where all of it is plain.

    That is: on CUDA; a norm that is torch's own LayerNorm without hooks; vectors for each sample, not one for all; one
    dtype and device; no gradients and no autocast. The two ways differ by the order in which float32 sums are taken.
    """
    if not _plain(norm, x, scale, shift):
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    return ada_norm(x, scale, shift, norm.eps, norm.weight, norm.bias)


def _plain(norm: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> bool:
    if type(norm) is not torch.nn.LayerNorm or hidden_state(norm) or tuple(norm.normalized_shape) != x.shape[2:]:
        return False
    if not scale.shape == shift.shape == (x.shape[0], x.shape[2]):
        return False
    given = [t for t in (x, scale, shift, norm.weight, norm.bias) if t is not None]
    own = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in given)
    alike = own and all((t.dtype, t.device) == (x.dtype, x.device) for t in given)
    asked = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return alike and not asked and not cast and not unsupported_reasons("triton", x)


# The forwards of diffusers' modules with `modulate` in them, by class name; None: stock must run.


def _zero(
    module: Any,
    x: torch.Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: torch.Tensor | None = None,
) -> Any:
    if module.emb is not None:
        return None
    shift, scale, *others = module.linear(module.silu(emb)).chunk(6, dim=1)
    return modulate(module.norm, x, scale, shift), *others


def _single(module: Any, x: torch.Tensor, emb: torch.Tensor | None = None) -> Any:
    shift, scale, gate = module.linear(module.silu(emb)).chunk(3, dim=1)
    return modulate(module.norm, x, scale, shift), gate


def _with_text(
    module: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
) -> Any:
    shift, scale, gate, *text = module.linear(module.silu(temb)).chunk(6, dim=1)
    video = modulate(module.norm, hidden_states, scale, shift)
    words = modulate(module.norm, encoder_hidden_states, text[1], text[0])
    return video, words, gate[:, None], text[2][:, None]


MODULATED: dict[str, Callable[..., Any]] = {
    "AdaLayerNormZero": _zero,
    "AdaLayerNormZeroSingle": _single,
    "CogVideoXLayerNormZero": _with_text,
}


def forward(stock: Callable[..., Any], host: Any, site: Site, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for such a module's forward: one pass where the block's attention will be sparse, else stock's own."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or not wants_triton(x) or host.dense_reason(site, x):
        return stock(module, *args, **kwargs)
    done = MODULATED[type(module).__name__](module, *args, **kwargs)
    return stock(module, *args, **kwargs) if done is None else done
