"""Draw the captions of chosen pairs with the shipped folder and stock diffusers.

python sample.py --side 128 --steps 20 --length 512 --target .data/training/pictures-128.npz

With `--style-guidance` above 1 every step is guided away from the same thing in no style, at twice the cost.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import Pair, load_pairs
from diffusers import FluxPipeline


def choose(pairs: list[Pair], trained_every: int, held_out_every: int) -> list[int]:
    """Places of every n-th trained and every m-th held-out pair."""
    trained = [i for i, p in enumerate(pairs) if not p.held_out]
    held_out = [i for i, p in enumerate(pairs) if p.held_out]
    return sorted(trained[::trained_every] + held_out[::held_out_every])


def draw(pipe: FluxPipeline, pairs: list[Pair], seeds: list[int], args: argparse.Namespace) -> np.ndarray:
    """uint8 pictures [N, side, side, 3]. The noise is drawn on the CPU, the same for any device."""
    pictures = []
    for start in range(0, len(pairs), args.batch):
        part = slice(start, start + args.batch)
        images = pipe(
            [pair.caption for pair in pairs[part]],
            negative_prompt=[pair.label for pair in pairs[part]] if args.style_guidance > 1 else None,
            true_cfg_scale=args.style_guidance,
            height=args.side,
            width=args.side,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=args.length,
            generator=[torch.Generator().manual_seed(s) for s in seeds[part]],
            output_type="np",
        ).images
        pictures.append((images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--style-guidance", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--trained-every", type=int, default=1, help="draw every n-th trained pair")
    parser.add_argument("--held-out-every", type=int, default=1, help="draw every n-th held-out pair")
    parser.add_argument("--limit", type=int, help="draw the first few only")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pairs = load_pairs(args.data)
    chosen = choose(pairs, args.trained_every, args.held_out_every)[: args.limit]
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    start = time.time()
    pictures = draw(pipe, [pairs[i] for i in chosen], chosen, args)
    np.savez(args.target, pictures=pictures, chosen=chosen)
    guidance = f"guidance {args.guidance}, of style {args.style_guidance}"
    setting = f"{args.side} px, {args.steps} steps, {guidance}, text {args.length}"
    print(f"{args.target.name}: {len(chosen)} pictures, {setting}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
