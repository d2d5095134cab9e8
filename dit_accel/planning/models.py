"""Models that can be planned without their weights: true configurations by name, folders, and twins on no device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

META = torch.device("meta")


@dataclass(frozen=True)
class TrueModel:
    """The configuration of one published model.

    `family` names its host, `transformer` its diffusers class; `settings` configure it, the layer counts aside.
    `groups`: attribute that lists blocks -> how many; `counts`: the setting that says so. `steps`: of diffusers' own
    pipeline.
    """

    name: str
    family: str
    transformer: str
    settings: Mapping[str, Any]
    groups: Mapping[str, int]
    counts: tuple[str, ...] = ("num_layers",)
    steps: int = 50

    def build(self, layers: int | None = None, **changes: Any) -> torch.nn.Module:
        """Build the transformer on the current default device, all of its blocks or so many of each group."""
        import diffusers

        depth = {name: layers or of for name, of in zip(self.counts, self.groups.values(), strict=True)}
        return getattr(diffusers, self.transformer)(**{**self.settings, **depth, **changes})


_WAN = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
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
_JOINT = ("num_layers", "num_single_layers")
_WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824}
_WAN_1B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960}

# without settings: the defaults of diffusers' class, which are the published model's
_TABLE = (
    TrueModel("wan-14b", "wan", "WanTransformer3DModel", _WAN_14B, {"blocks": 40}),
    TrueModel("wan-1.3b", "wan", "WanTransformer3DModel", _WAN_1B, {"blocks": 30}),
    TrueModel(
        "hunyuan-video",
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN,
        {"transformer_blocks": 20, "single_transformer_blocks": 40},
        _JOINT,
    ),
    TrueModel(
        "flux",
        "flux",
        "FluxTransformer2DModel",
        _FLUX,
        {"transformer_blocks": 19, "single_transformer_blocks": 38},
        _JOINT,
        steps=28,
    ),
    TrueModel("qwen-image", "qwen-image", "QwenImageTransformer2DModel", {}, {"transformer_blocks": 60}),
    TrueModel("cogvideox-2b", "cogvideox", "CogVideoXTransformer3DModel", {}, {"transformer_blocks": 30}),
    TrueModel("ltx-video", "ltx-video", "LTXVideoTransformer3DModel", {}, {"transformer_blocks": 28}),
)
MODELS: dict[str, TrueModel] = {model.name: model for model in _TABLE}


def true_twin(model: TrueModel, dtype: torch.dtype) -> torch.nn.Module:
    """Build a published model on no device."""
    with META:
        return cast(model.build(), dtype)


def twin(transformer: Any) -> torch.nn.Module:
    """Build a transformer of the same class and configuration, in the same dtype, on no device."""
    with META:
        made = type(transformer).from_config(transformer.config)
    return cast(made, main_dtype(transformer))


def main_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype of most of a model's floating-point weights; some parts stay in fp32."""
    size = Counter[torch.dtype]()
    for weight in model.parameters():
        size[weight.dtype] += weight.numel() * weight.is_floating_point()
    return size.most_common(1)[0][0]


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Set a model to `dtype`, but for what diffusers keeps in fp32 when it loads weights, and to inference."""
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if not keep & set(name.split(".")):
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None and key not in keep and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """Make the pipeline of a folder in diffusers' format without weights: transformers and VAE on no device, else None.

    Raises ConfigError where the folder cannot be read, or its pipeline is none of diffusers'.
    """
    import diffusers

    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts: dict[str, Any] = {name: None for name, of in index.items() if isinstance(of, list)}
        for name in {"transformer", "transformer_2", "vae"} & parts.keys():
            if index[name][1] is not None:
                cls = getattr(diffusers, index[name][1])
                with META:
                    parts[name] = cast(cls.from_config(cls.load_config(folder / name)), dtype)
        settings = {name: of for name, of in index.items() if name not in parts and not name.startswith("_")}
        return getattr(diffusers, index["_class_name"])(**parts, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model {folder}: no pipeline can be made from its configuration ({what}).") from None
