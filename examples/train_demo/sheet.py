"""A sheet of 48 drawn pictures, half of them held-out pairs, with their captions.

python sheet.py --pictures .data/training/pictures-256.npz --target docs/images/emoji-flux-sheet.png
"""

import argparse
import random
from pathlib import Path

import numpy as np
from data import Pair, load_pairs
from PIL import Image, ImageDraw, ImageFont

COLUMNS, COUNT, CELL, LABEL = 8, 48, 160, 20


def choose(pairs: list[Pair], drawn: list[int], seed: int) -> list[int]:
    """Places in `drawn`: trained and held-out pairs in turn, at random."""
    rng = random.Random(seed)
    held_out = rng.sample([k for k, i in enumerate(drawn) if pairs[i].held_out], COUNT // 2)
    trained = rng.sample([k for k, i in enumerate(drawn) if not pairs[i].held_out], COUNT // 2)
    return [k for two in zip(trained, held_out, strict=True) for k in two]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs, drawn = load_pairs(args.data), np.load(args.pictures)
    sheet = Image.new("RGB", (COLUMNS * CELL, COUNT // COLUMNS * (CELL + LABEL)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, k in enumerate(choose(pairs, drawn["chosen"].tolist(), args.seed)):
        pair = pairs[drawn["chosen"][k]]
        x, y = place % COLUMNS * CELL, place // COLUMNS * (CELL + LABEL)
        picture = Image.fromarray(drawn["pictures"][k]).resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        name = ("* " if pair.held_out else "") + pair.caption.removesuffix(" style")
        pen.text((x + 4, y + CELL + 2), name, fill="firebrick" if pair.held_out else "black", font=font)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.target, optimize=True)


if __name__ == "__main__":
    main()
