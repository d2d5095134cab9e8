"""Write the trained weights as a stock FluxPipeline folder, the blocks' matrices in fp8.

python export.py --work .data/training --target ../../dit_accel/demo_models/emoji-flux
"""

import argparse
import json
from pathlib import Path

import torch
from captions import OTHER, build_tokenizers, build_vocabulary
from data import load_pairs
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from model import SHAPES, build_scheduler, build_text_encoders, build_transformer
from optimizer import is_block_matrix
from safetensors.torch import load_file, save_file
from torch import nn

SHARDS = 3  # files of the exported training weights, each under 16 MiB
GUIDANCE = 1.0  # the only guidance input trained with
EMBEDDINGS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")  # ends of the text encoders' names
WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Averaged training weights as bf16 files of about the same size."""
    names = list(weights)
    limit = sum(w.numel() for w in weights.values()) / SHARDS
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    filled = 0
    for name in names:
        parts[min(int(filled / limit), SHARDS - 1)][name] = weights[name].bfloat16().cpu().contiguous()
        filled += weights[name].numel()
    for i, part in enumerate(parts):
        save_file(part, folder / f"weights-{i}.safetensors")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("weights-*.safetensors")) for k, v in load_file(file).items()}


def load_pipeline_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Training weights back out of an exported pipeline."""
    pipe = FluxPipeline.from_pretrained(folder)
    parts = {"transformer.": pipe.transformer, "clip.": pipe.text_encoder, "t5.": pipe.text_encoder_2}
    return {prefix + k: v for prefix, module in parts.items() for k, v in module.state_dict().items()}


def part(weights: dict[str, torch.Tensor], prefix: str, words: int | None = None) -> dict[str, torch.Tensor]:
    """One module's weights; `words` cuts a text encoder's embedding to the words that ship, the first ones."""
    own = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    return {k: v[:words] if k.endswith(EMBEDDINGS) else v for k, v in own.items()}


def to_fp8(folder: Path) -> None:
    """Rewrite the transformer's file: the blocks' matrices as float8_e4m3fn, all else as bf16."""
    weights = load_file(folder / WEIGHTS)
    small = {
        k: v.to(torch.float8_e4m3fn if is_block_matrix(k, nn.Parameter(v)) else torch.bfloat16)
        for k, v in weights.items()
    }
    save_file(small, folder / WEIGHTS, metadata={"format": "pt"})


def load_in_fp32(folder: Path) -> None:
    """The text encoders' weights are bf16, but without a torch_dtype they shall load as the rest does."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2) + "\n")


def name_stock_tokenizer(folder: Path) -> None:
    """Name the tokenizers' class as transformers 4 and 5 both know it."""
    for file in (folder / "model_index.json", *folder.glob("tokenizer*/tokenizer_config.json")):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def forget_paths(folder: Path) -> None:
    """Take out where parts came from: paths of the machine that trained them."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def fold_guidance(transformer: FluxTransformer2DModel) -> None:
    """Make the guidance input a constant: the pipeline passes 3.5, the model knows one value only."""
    embedding = transformer.time_text_embed
    first = embedding.guidance_embedder.linear_1
    first.bias.copy_(first(embedding.time_proj(torch.tensor([1000 * GUIDANCE])))[0])
    first.weight.zero_()


def export(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    weights = load_weights(args.work)
    vocabulary = build_vocabulary(load_pairs(args.data))
    transformer = build_transformer(shape)
    clip, t5 = build_text_encoders(shape, len(vocabulary))
    transformer.load_state_dict(part(weights, "transformer."))
    fold_guidance(transformer)
    clip.load_state_dict(part(weights, "clip.", len(vocabulary)))
    own = part(weights, "t5.", len(vocabulary))
    t5.load_state_dict(own, strict=False)  # its second name for the shared embedding is left out
    tokenizer, tokenizer_2 = build_tokenizers(vocabulary, args.clip_reads)
    pipe = FluxPipeline(
        scheduler=build_scheduler(args.shift_128, args.shift_256),
        vae=AutoencoderKL.from_pretrained(args.work / "vae").to(torch.bfloat16),
        text_encoder=clip.to(torch.bfloat16),
        tokenizer=tokenizer,
        text_encoder_2=t5.to(torch.bfloat16),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipe.save_pretrained(args.target)
    to_fp8(args.target / "transformer")
    name_stock_tokenizer(args.target)
    forget_paths(args.target)
    load_in_fp32(args.target / "text_encoder")
    load_in_fp32(args.target / "text_encoder_2")
    size = sum(f.stat().st_size for f in args.target.rglob("*") if f.is_file())
    print(f"{args.target}: {size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--work", type=Path, default=Path(".data/training"))
    parser.add_argument("--target", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--shift-128", type=float, default=4.0)
    parser.add_argument("--shift-256", type=float, default=7.0)
    parser.add_argument("--clip-reads", choices=OTHER, default="style", help="as in training")
    parser.add_argument("--shape", choices=SHAPES, default="full")
    export(parser.parse_args())


if __name__ == "__main__":
    main()
