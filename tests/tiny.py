"""Tiny random pipelines of all families, built offline; they prove plumbing, not pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "an", "the", "cat", "dog", "of", "and", "photo", "dance", "monkey", "red", "blue", "taco", "style"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    return T5EncoderModel(config).eval()


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(i) for i in range(33, 127)]
    tokens = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *[c + "</w>" for c in letters]]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", model_max_length=77)


def clip(projection: bool = False, width: int = 32) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def flat_vae(latents: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=latents,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def flux_transformer(double: int = 1, single: int = 1, heads: int = 2) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux(seed: int = 0, heads: int = 2) -> tuple[FluxPipeline, dict[str, Any]]:
    torch.manual_seed(seed)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
        transformer=flux_transformer(heads=heads),
        vae=flat_vae(1),
    )
    return pipe, {
        "prompt": "a cat",
        "height": 34,
        "width": 26,
        "max_sequence_length": 16,
        "output_type": "latent",
    }


def kontext() -> tuple[FluxKontextPipeline, dict[str, Any]]:
    pipe = FluxKontextPipeline(**flux()[0].components)
    picture = Image.effect_noise((26, 34), 64).convert("RGB")
    sizes = {"height": 22, "width": 18, "max_area": 22 * 18, "_auto_resize": False}
    return pipe, {
        "prompt": "a cat",
        "image": picture,
        **sizes,
        "max_sequence_length": 16,
        "output_type": "latent",
    }


def sd3() -> tuple[StableDiffusion3Pipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=word_tokenizer(),
        transformer=transformer,
        vae=flat_vae(4),
    )
    return pipe, {
        "prompt": "a cat",
        "height": 25,
        "width": 21,
        "max_sequence_length": 16,
        "output_type": "latent",
    }


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**{**settings, **changes})


def wan_parts() -> dict[str, Any]:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": t5(),
        "tokenizer": word_tokenizer(),
    }


WAN_CALL = {"prompt": "dance monkey", "negative_prompt": "a", "height": 80, "width": 48, "num_frames": 9}


def wan(heads: int = 2) -> tuple[WanPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = wan_transformer(attention_head_dim=12, num_attention_heads=heads)
    pipe = WanPipeline(transformer=transformer, transformer_2=None, **wan_parts())
    return pipe, {**WAN_CALL, "max_sequence_length": 16, "output_type": "latent"}


def wan_two_experts() -> tuple[WanPipeline, dict[str, Any]]:
    """Wan 2.2 14B: the second transformer takes over at low noise, after the first of two steps."""
    torch.manual_seed(0)
    experts = {"transformer": wan_transformer(), "transformer_2": wan_transformer()}
    pipe = WanPipeline(**experts, boundary_ratio=0.9, **wan_parts())
    return pipe, {**WAN_CALL, "max_sequence_length": 16, "output_type": "latent"}


def wan_per_token_time() -> tuple[WanPipeline, dict[str, Any]]:
    """Wan 2.2 5B: a timestep for each token."""
    torch.manual_seed(0)
    pipe = WanPipeline(transformer=wan_transformer(), expand_timesteps=True, **wan_parts())
    return pipe, {**WAN_CALL, "max_sequence_length": 16, "output_type": "latent"}


def wan_image() -> tuple[WanImageToVideoPipeline, dict[str, Any]]:
    """Wan 2.1 image to video: picture tokens in cross-attention; the processor expects 512 text tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    pipe = WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=32),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        **wan_parts(),
    )
    return pipe, wan_image_call(512)


def wan_image_per_token_time() -> tuple[WanImageToVideoPipeline, dict[str, Any]]:
    """Wan 2.2 5B image to video: the first latent frame is the picture and stands at time 0."""
    torch.manual_seed(0)
    pipe = WanImageToVideoPipeline(transformer=wan_transformer(), expand_timesteps=True, **wan_parts())
    return pipe, wan_image_call(16)


def wan_image_call(words: int) -> dict[str, Any]:
    """The image-to-video pipeline cleans prompts with a package that is not required: hand it embeddings."""
    given = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, words, 32, generator=given)
    pixels = torch.randint(256, (80, 48, 3), generator=given, dtype=torch.uint8)
    call = {"image": Image.fromarray(pixels.numpy()), "prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    return {**call, "height": 80, "width": 48, "num_frames": 9, "output_type": "latent"}


def hunyuan_video() -> tuple[HunyuanVideoPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    pipe = HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=LlamaModel(llama).eval(),
        text_encoder_2=clip(width=8),
        tokenizer=word_tokenizer(),
        tokenizer_2=clip_tokenizer(),
    )
    call = {"prompt": "dance monkey", "prompt_template": {"template": "{}", "crop_start": 0}}
    sizes = {"height": 176, "width": 112, "num_frames": 9, "max_sequence_length": 16}
    return pipe, {**call, **sizes, "output_type": "latent"}


def cogvideox(rotary: bool = False) -> tuple[CogVideoXPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        use_rotary_positional_embeddings=rotary,
        text_embed_dim=32,
        num_layers=1,
        sample_width=12,
        sample_height=20,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=16,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = CogVideoXPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=DDIMScheduler(),
    )
    call = {"prompt": "dance monkey", "negative_prompt": "a", "height": 176, "width": 112, "num_frames": 9}
    return pipe, {**call, "max_sequence_length": 16, "output_type": "latent"}


def cogvideox_rotary() -> tuple[CogVideoXPipeline, dict[str, Any]]:
    """CogVideoX 5B turns its video tokens; 2B adds positions instead."""
    return cogvideox(rotary=True)


def qwen_image() -> tuple[QwenImagePipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    words = torch.randn(2, 1, 8, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0  # padded text, so that the attention mask matters
    call = {"prompt_embeds": words[0], "prompt_embeds_mask": mask}
    negative = {
        "negative_prompt_embeds": words[1],
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 2.0,
    }
    return pipe, {**call, **negative, "height": 104, "width": 72, "output_type": "latent"}


def ltx() -> tuple[LTXPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=8,  # pixels by 32, as in the published one: sizes must be multiples of 32, tokens may be odd
        patch_size_t=1,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    pipe = LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    call = {"prompt": "dance monkey", "negative_prompt": "a", "height": 352, "width": 224, "num_frames": 9}
    return pipe, {**call, "max_sequence_length": 16, "output_type": "latent"}


def pixart() -> tuple[PixArtAlphaPipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    pipe = PixArtAlphaPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=DDIMScheduler(),
        text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )
    call = {"prompt": "a cat", "height": 152, "width": 88, "use_resolution_binning": False}
    return pipe, {**call, "output_type": "latent"}


def z_image() -> tuple[ZImagePipeline, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        latent_channels=16,
        scaling_factor=0.36,
        shift_factor=0.11,
    )
    pipe = ZImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    words = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    call = {"prompt_embeds": [words[0]], "negative_prompt_embeds": [words[1]], "height": 68, "width": 52}
    return pipe, {**call, "output_type": "latent"}


VIDEO = (
    wan,
    wan_two_experts,
    wan_per_token_time,
    wan_image,
    wan_image_per_token_time,
    hunyuan_video,
    cogvideox,
    cogvideox_rotary,
)
FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    f.__name__: f for f in (flux, kontext, sd3, *VIDEO, qwen_image, ltx, pixart, z_image)
}


def generate(pipe: Any, call: dict[str, Any], *, steps: int = 2, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Run a pipeline and return its pictures or frames."""
    pipe.set_progress_bar_config(disable=True)
    out = pipe(**{**call, **changes}, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(out.images if hasattr(out, "images") else out.frames)
