"""Score drawn pictures with the judge, beside its scores on the real ones.

python judge.py .data/training/pictures-*.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from classifier import SIDE, Judge, load_judge
from data import Pair, load_pairs, load_pictures
from vae import shrink


@torch.no_grad()
def scores(judge: Judge, pictures: torch.Tensor, pairs: list[Pair]) -> str:
    """Concept top-1 and top-5 and style top-1 of uint8 pictures [N, 3, H, W]."""
    if not pairs:
        return "-"
    concept = torch.tensor([p.concept for p in pairs], device=pictures.device)
    style = torch.tensor([p.style for p in pairs], device=pictures.device)
    parts = [judge(shrink(part.float() / 255, SIDE)) for part in pictures.split(64)]
    named, styled = (torch.cat(logits) for logits in zip(*parts, strict=True))
    hits = named.topk(5).indices == concept[:, None]
    right = (
        hits[:, 0].float().mean(),
        hits.any(1).float().mean(),
        (styled.argmax(1) == style).float().mean(),
    )
    return " | ".join(f"{r.item():.3f}" for r in right) + f" | {len(pairs)}"


def rows(judge: Judge, title: str, pictures: torch.Tensor, pairs: list[Pair]) -> None:
    for name, held_out in (("trained", False), ("held out", True)):
        places = [i for i, p in enumerate(pairs) if p.held_out == held_out]
        print(
            f"| {title} | {name} | {scores(judge, pictures[places], [pairs[i] for i in places])} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--judge", type=Path, default=Path(".data/training/classifier.safetensors"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pairs = load_pairs(args.data)
    judge = load_judge(args.judge, 1 + max(p.concept for p in pairs), args.device)
    print("| pictures | pairs | concept top-1 | top-5 | style | count |\n|---|---|---|---|---|---|")
    rows(judge, "real", load_pictures(pairs).to(args.device), pairs)
    for file in args.pictures:
        drawn = np.load(file)
        pictures = torch.from_numpy(drawn["pictures"]).permute(0, 3, 1, 2).to(args.device)
        rows(judge, file.stem, pictures, [pairs[i] for i in drawn["chosen"]])


if __name__ == "__main__":
    main()
