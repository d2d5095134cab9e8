"""Every other family: run its own processor and intercept the scaled-dot-product attention inside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .. import compiled
from ..attend import attend
from ..call import AttentionCall, Site
from ..layout import Grid, TokenLayout
from ..seat import Seat
from .family import Host

_BYPASS = "its attention backend bypasses scaled_dot_product_attention"
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class Intercept(TorchFunctionMode):
    """Hand each scaled-dot-product attention to `handler`; local to the `with` block, nothing global is patched."""

    def __init__(self, handler: Callable[[dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.handler({**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})})
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # the method is Python, which torch.compile cannot trace from within a mode
        return func(*args, **(kwargs or {}))


def attention(
    original: Any,
    host: Host | Seat,
    site: Site,
    attn: Any,
    hidden_states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stand in for any processor; what it returns is what the processor returns."""
    stock = partial(original, attn, hidden_states, *args, **kwargs)
    if isinstance(host, Seat):
        return _traced(host, site, hidden_states, stock)
    ledger, device = host.engine.ledger, hidden_states.device
    reason = host.dense_reason(site, hidden_states)
    if reason:
        with ledger.timed_dense(site, host.step, device, reason):
            return stock()
    seen = []
    with Intercept(lambda arguments: _one_call(host, site, seen, arguments)):
        out = stock()
    if not seen:
        ledger.note_dense(site, host.step, _BYPASS)
    return out


def _traced(seat: Seat, site: Site, x: torch.Tensor, stock: Callable[[], Any]) -> Any:
    """Trace the processor itself, one opaque operation in the place of each scaled-dot-product attention."""
    reason = seat.dense_reason(site, x)
    if reason:
        seat.inlined = reason
        return stock()
    seen = []

    def one_call(arguments: dict[str, Any]) -> torch.Tensor:
        seen.append(True)
        return compiled.sdpa(seat.number, **arguments)

    with Intercept(one_call):
        out = stock()
    if not seen:
        seat.inlined = _BYPASS
    return out


def answer(host: Host, site: Site, arguments: dict[str, Any]) -> torch.Tensor:
    """Carry out a scaled-dot-product attention of compiled code, [B, H, S, D] in and out."""
    query = arguments["query"]
    reason = host.dense_reason(site, query)
    if not reason:
        return _one_call(host, site, [], arguments)
    with host.engine.ledger.timed_dense(site, host.step, query.device, reason):
        return F.scaled_dot_product_attention(**arguments)


def _one_call(host: Host, site: Site, seen: list[str], arguments: dict[str, Any]) -> torch.Tensor:
    query, key = arguments["query"], arguments["key"]
    layout, reason = _matching_layout(host.layout, query, key)
    bias: torch.Tensor | None = None
    if not reason:
        reason = _unsuited(arguments)
    if not reason:
        bias, reason = key_bias(arguments.get("attn_mask"), key.shape[-2])
    if not reason:
        reason = host.dense_reason(site, query)
    seen.append(reason)
    if reason or layout is None:
        with host.engine.ledger.timed_dense(site, host.step, query.device, reason):
            return F.scaled_dot_product_attention(**arguments)
    scale = arguments.get("scale")
    call = AttentionCall(
        site=site,
        step=host.step,
        layout=layout,
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        v=arguments["value"].transpose(1, 2),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        stock=partial(_dense, arguments),
        key_bias=bias,
    )
    return attend(call, host.engine).transpose(1, 2)


def _dense(arguments: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    changed = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
    return F.scaled_dot_product_attention(**{**arguments, **changed}).transpose(1, 2)


def _matching_layout(
    layout: TokenLayout | None, query: torch.Tensor, key: torch.Tensor
) -> tuple[TokenLayout | None, str]:
    """Return the layout of this call: the joint one, or the grid alone (SD3.5's second attention)."""
    assert layout is not None
    lengths = (query.shape[-2], key.shape[-2])
    if lengths == (layout.length, layout.length):
        return layout, ""
    grids = [s for s in layout.segments if isinstance(s, Grid)]
    alone = TokenLayout(grids)
    if lengths == (alone.length, alone.length):
        return alone, ""
    return None, f"{lengths[0]} queries and {lengths[1]} keys are not the layout's {layout.length} tokens"


def _unsuited(arguments: dict[str, Any]) -> str:
    if arguments.get("is_causal"):
        return "the attention is causal"
    if arguments.get("dropout_p"):
        return "the attention has dropout"
    return ""


def key_bias(mask: torch.Tensor | None, keys: int) -> tuple[torch.Tensor | None, str]:
    """Turn a mask that is the same for all queries, [B|1, H|1, 1, keys], into a bias [B|1, H|1, keys].

    Boolean masks (True attends) become 0 and -inf, float masks are added as they are. Otherwise say why not.
    """
    if mask is None:
        return None, ""
    if mask.ndim != 4 or mask.shape[-2] != 1 or mask.shape[-1] != keys:
        return None, f"its attention mask {tuple(mask.shape)} differs from query to query"
    row = mask[..., 0, :]
    if row.dtype == torch.bool:
        return torch.zeros(row.shape, device=row.device).masked_fill(~row, float("-inf")), ""
    return row.float(), ""
