"""Look whether a pipeline's text encoders still tell captions apart: sizes of their states, likeness of their outputs.

python encoders.py dit_accel/demo_models/emoji-flux
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captions import LENGTH
from data import STYLES, load_pairs
from diffusers import FluxPipeline
from rich.console import Console
from rich.table import Table


def likeness(vectors: torch.Tensor) -> float:
    """Mean cosine of neighbours [N, D], 1 where all are alike."""
    return sum(float(F.cosine_similarity(a, b, dim=0)) for a, b in pairwise(vectors)) / (len(vectors) - 1)


@torch.no_grad()
def states(encoder: Any, tokenizer: Any, captions: list[str]) -> tuple[list[str], torch.Tensor]:
    """Mean length of the first token's state after each layer, and what the transformer gets of each caption [N, D]."""
    ids = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    read = encoder(ids, output_hidden_states=True)
    sizes = [f"{state[:, 0].norm(dim=-1).mean():.0f}" for state in read.hidden_states]
    pooled = getattr(read, "pooler_output", None)
    return sizes, read[0][:, 0] if pooled is None else pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    args = parser.parse_args()
    labels = list(dict.fromkeys(pair.label for pair in load_pairs(args.data)))
    table = Table("pipeline", "encoder", "sizes by layer", "likeness of things", "of styles")
    for folder in args.folders:
        pipe = FluxPipeline.from_pretrained(folder)
        encoders = {"CLIP": (pipe.text_encoder, pipe.tokenizer), "T5": (pipe.text_encoder_2, pipe.tokenizer_2)}
        for name, (encoder, tokenizer) in encoders.items():
            sizes, things = states(encoder, tokenizer, [f"{label}, noto style" for label in labels])
            _, styles = states(encoder, tokenizer, [f"{labels[0]}, {style} style" for style in STYLES])
            table.add_row(str(folder), name, ", ".join(sizes), f"{likeness(things):.2f}", f"{likeness(styles):.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
