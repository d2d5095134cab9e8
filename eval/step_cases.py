"""The models and inputs of the step benchmark: true shapes with random weights on a few layers, and tiny twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One model at one size. `groups`: attribute of the model that lists its blocks -> depth of the real model.

    `layers`: how many blocks of each group are built. `settings`: the transformer's configuration, the layer counts
    aside. `grid`: latent frames, height and width. `text`: text tokens.
    """

    name: str
    build: Callable[[Case], torch.nn.Module]
    inputs: Callable[[Case, torch.device, torch.dtype], Inputs]
    groups: Mapping[str, int]
    layers: int
    settings: Mapping[str, Any]
    grid: tuple[int, int, int]
    text: int

    @property
    def depth(self) -> int:
        return sum(self.groups.values())


def _wan(case: Case) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=case.layers, **case.settings)


def _wan_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    frames, height, width = case.grid
    settings = case.settings
    return {
        "hidden_states": torch.randn(1, settings["in_channels"], frames, height, width, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": torch.randn(1, case.text, settings["text_dim"], device=device, dtype=dtype),
    }


def _hunyuan(case: Case) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=case.layers, num_single_layers=case.layers, **case.settings)


def _hunyuan_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    frames, height, width = case.grid
    settings = case.settings
    valid = torch.arange(case.text, device=device)[None] < case.text // 2  # a prompt that fills half of its room
    return {
        "hidden_states": torch.randn(1, settings["in_channels"], frames, height, width, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, case.text, settings["text_embed_dim"], device=device, dtype=dtype),
        "encoder_attention_mask": valid.to(dtype),
        "pooled_projections": torch.randn(1, settings["pooled_projection_dim"], device=device, dtype=dtype),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


def _flux(case: Case) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=case.layers, num_single_layers=case.layers, **case.settings)


def _flux_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    _, height, width = case.grid
    settings = case.settings
    ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in (1, height, width)))
    return {
        "hidden_states": torch.randn(1, height * width, settings["in_channels"], device=device, dtype=dtype),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, case.text, settings["joint_attention_dim"], device=device, dtype=dtype),
        "pooled_projections": torch.randn(1, settings["pooled_projection_dim"], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device, dtype=dtype),
        "img_ids": ids.to(dtype),
        "txt_ids": torch.zeros(case.text, 3, device=device, dtype=dtype),
    }


_WAN = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
_WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824}
_WAN_1B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960}
_HUNYUAN = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 16,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_FLUX = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_JOINT = {"transformer_blocks": 20, "single_transformer_blocks": 40}
_FLUX_JOINT = {"transformer_blocks": 19, "single_transformer_blocks": 38}

CASES = (
    Case("wan-14b-720p-81", _wan, _wan_inputs, {"blocks": 40}, 2, _WAN_14B, (21, 90, 160), 512),
    Case("hunyuan-720p-129", _hunyuan, _hunyuan_inputs, _JOINT, 1, _HUNYUAN, (33, 90, 160), 256),
    Case("wan-1.3b-480p-81", _wan, _wan_inputs, {"blocks": 30}, 2, _WAN_1B, (21, 60, 104), 512),
    Case("flux-4096", _flux, _flux_inputs, _FLUX_JOINT, 1, _FLUX, (1, 256, 256), 512),
)

_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
_TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "wan-14b-720p-81": {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64},
    "hunyuan-720p-129": {
        "in_channels": 4,
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6),
        "num_refiner_layers": 1,
    },
    "wan-1.3b-480p-81": {"text_dim": 32, "freq_dim": 32, "ffn_dim": 48},
    "flux-4096": {
        "in_channels": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}


def tiny(case: Case) -> Case:
    """Return a twin of a case that runs on a CPU in a moment: the same path, few channels and tokens, odd sizes."""
    settings = {**case.settings, **_SMALL, **_TINY_SETTINGS[case.name]}
    grid = (1, 23, 29) if case.grid[0] == 1 else (5, 14, 22)
    return replace(case, name=f"tiny-{case.name}", settings=settings, grid=grid, text=16)


def built(case: Case, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Build a case's model on its device, in `dtype` but for what diffusers keeps in fp32 when it loads weights."""
    with torch.device(device):
        model: Any = case.build(case)
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if not keep & set(name.split(".")):
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and key not in keep and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)
