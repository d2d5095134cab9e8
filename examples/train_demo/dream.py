"""Draw the pairs that have no picture under a rule of guidance, for stage dreams of `train.py` to learn from.

    python dream.py --model .data/training/pipe --rule "thing above 0.7, style 1.6"

No real picture of those pairs is seen: the model learns to draw without guidance what it draws with it, as in
distillation of guidance (Meng et al. 2023, arXiv 2210.03142), here along whole trajectories.
"""

import argparse
import random
from pathlib import Path

import torch
from data import load_pairs
from diffusers import FluxPipeline
from guide import SETTINGS, draw
from safetensors.torch import save_file

BATCH = {128: 192, 256: 48}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--rule", required=True, help="as guide.py reads it")
    parser.add_argument("--each", type=int, default=8, help="pictures of a pair, each from other noise")
    parser.add_argument("--sides", type=int, nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--target", type=Path, default=Path(".data/training/dreams.safetensors"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pairs = [pair for pair in load_pairs(args.data) if pair.held_out] * args.each
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    result = {"pairs": torch.tensor([(pair.concept, pair.style) for pair in pairs])}
    for side in args.sides:
        seeds = random.Random(side).sample(range(2**31), len(pairs))
        parts = [range(k, min(k + BATCH[side], len(pairs))) for k in range(0, len(pairs), BATCH[side])]
        drawn = [draw(pipe, [pairs[i] for i in p], [seeds[i] for i in p], args.rule, side).half().cpu() for p in parts]
        result[str(side)] = torch.cat(drawn)
        print(f"{side} px: {len(pairs)} pictures", flush=True)
    save_file(result, args.target)


if __name__ == "__main__":
    main()
