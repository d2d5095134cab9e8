"""Write the trained weights as a stock WanPipeline folder, the blocks' matrices in fp8.

python video_export.py --work .data/video --target dit_accel/demo_models/emoji-wan
"""

import argparse
import json
from pathlib import Path

import torch
from captions import build_tokenizer
from data import load_pairs
from diffusers import AutoencoderKLWan, WanPipeline
from export import forget_paths, load_in_fp32, load_weights, name_stock_tokenizer, part, to_fp8
from video_model import SHAPES, build_scheduler, build_text_encoder, build_transformer
from video_render import FRAMES
from video_scenes import build_vocabulary

# What a caller passes who does not want WanPipeline's own 480 x 832 and 50 steps.
SETTINGS = {"height": 384, "width": 512, "frames": FRAMES, "fps": 16, "steps": 16, "guidance": 3.0}


def export(args: argparse.Namespace) -> None:
    shape = SHAPES[args.shape]
    weights = load_weights(args.work)
    vocabulary = build_vocabulary(load_pairs(args.data))
    transformer = build_transformer(shape)
    text = build_text_encoder(shape, len(vocabulary))
    transformer.load_state_dict(part(weights, "transformer."))
    text.load_state_dict(part(weights, "text."), strict=False)  # its second name for the embedding is left out
    pipe = WanPipeline(
        tokenizer=build_tokenizer(vocabulary),
        text_encoder=text.to(torch.bfloat16),
        vae=AutoencoderKLWan.from_pretrained(args.work / "vae").to(torch.bfloat16),
        scheduler=build_scheduler(args.shift),
        transformer=transformer,
    )
    pipe.save_pretrained(args.target)
    to_fp8(args.target / "transformer")
    name_stock_tokenizer(args.target)
    forget_paths(args.target)
    load_in_fp32(args.target / "text_encoder")
    settings = SETTINGS | {"steps": args.steps, "guidance": args.guidance}
    (args.target / "dit_accel.json").write_text(json.dumps(settings, indent=2) + "\n")
    size = sum(f.stat().st_size for f in args.target.rglob("*") if f.is_file())
    print(f"{args.target}: {size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--work", type=Path, default=Path(".data/video"))
    parser.add_argument("--target", type=Path, default=Path("dit_accel/demo_models/emoji-wan"))
    parser.add_argument("--shift", type=float, default=5.0, help="of the sampler's times toward noise")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"], help="written to dit_accel.json")
    parser.add_argument("--guidance", type=float, default=SETTINGS["guidance"], help="written to dit_accel.json")
    parser.add_argument("--shape", choices=SHAPES, default="full")
    export(parser.parse_args())


if __name__ == "__main__":
    main()
