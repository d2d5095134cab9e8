"""Draw the pairs that have no picture under rules of guidance, for stage dreams of `train.py` to learn from.

    python dream.py --model .data/training/pipe --rules "thing above 0.7, style 1.6"
    python dream.py --rules "style 2" --starts 1 0.9 --each 6 --judges .data/training/second.safetensors --keep 4
    python dream.py --rules "style 2, unnamed below 1.1" --restyle .data/training/restyle.safetensors --each 6

No real picture of those pairs is seen: the model learns to draw without guidance what it draws with it, as in
distillation of guidance (Meng et al. 2023, arXiv 2210.03142), here along whole trajectories. From a start under 1 it
draws over the same thing in another style, so much noise of which is left (SDEdit, Meng et al. 2021, arXiv 2108.01073);
weights of `restyle.py` see its pictures in all styles. With judges only the pictures are kept in which they find thing
and style most surely; none of them should be the one that scores the model later.
"""

import argparse
import itertools
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from classifier import SIDE, Judge, load_judge
from data import Pair, load_pairs, load_pictures
from diffusers import FluxPipeline
from guide import SETTINGS, decode, draw
from restyle import load_restyling, places_by_style, side_by_side
from safetensors.torch import save_file
from train import other_styles, scaled_latents
from vae import shrink

BATCH = {128: 192, 256: 48}


@dataclass(frozen=True)
class Dream:
    """One picture to draw: which missing pair, by which rule, from which time on, over which real picture."""

    pair: int
    rule: str
    start: float
    below: int
    seed: int


def dreams_of(below: torch.Tensor, rules: list[str], starts: list[float], each: int, seed: int) -> list[Dream]:
    """`each` pictures of every pair, rule and start, each from other noise and the other styles in turn.

    `below` [pairs, styles - 1]: the places of the same thing's real pictures.
    """
    kinds = list(itertools.product(rules, starts, range(each)))  # whole batches share rule and start
    seeds = iter(random.Random(seed).sample(range(2**31), len(kinds) * len(below)))
    places = below.tolist()
    return [
        Dream(pair, rule, start, others[turn % len(others)], next(seeds))
        for rule, start, turn in kinds
        for pair, others in enumerate(places)
    ]


def best(dreams: list[Dream], worth: torch.Tensor, keep: int) -> list[int]:
    """Places of the `keep` dreams of every pair that are worth most, pair by pair."""
    order = sorted(range(len(dreams)), key=lambda i: (dreams[i].pair, -float(worth[i])))
    groups = itertools.groupby(order, key=lambda i: dreams[i].pair)
    return [i for _, group in groups for i in itertools.islice(group, keep)]


@torch.no_grad()
def surety(judges: list[Judge], pictures: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
    """How surely judges find the thing and the style in pictures: the mean of their log probabilities of both [N]."""
    rows, result = torch.arange(len(pairs)), torch.zeros(len(pairs))
    for judge in judges:
        named, styled = (logits.float().log_softmax(-1).cpu() for logits in judge(shrink(pictures, SIDE)))
        result += (named[rows, [p.concept for p in pairs]] + styled[rows, [p.style for p in pairs]]) / len(judges)
    return result


def dream(
    pipe: FluxPipeline,
    missing: list[Pair],
    dreams: list[Dream],
    real: torch.Tensor,
    beside: torch.Tensor | None,
    judges: list[Judge],
    side: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw, and judge if there are judges: latents, half [N, tokens, channels], and how sure they are [N].

    `beside` [pairs, styles] has the places of the real latents that a transformer of `restyle.py` sees.
    """
    latents, worth = [], []
    for (rule, start), group in itertools.groupby(dreams, key=lambda one: (one.rule, one.start)):
        whole = list(group)
        for part in (whole[k : k + BATCH[side]] for k in range(0, len(whole), BATCH[side])):
            pairs, seeds = [missing[one.pair] for one in part], [one.seed for one in part]
            below = real[[one.below for one in part]] if start < 1 else None
            seen = None if beside is None else side_by_side(real.__getitem__, beside[[one.pair for one in part]])
            drawn = draw(pipe, pairs, seeds, rule, side, start, below, seen)
            latents.append(drawn.half().cpu())
            worth.append(surety(judges, decode(pipe, drawn, side), pairs) if judges else torch.zeros(len(part)))
    return torch.cat(latents), torch.cat(worth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--rules", nargs="+", required=True, help="as guide.py reads them")
    parser.add_argument("--starts", type=float, nargs="+", default=[1.0], help="1: noise alone, else over a picture")
    parser.add_argument("--each", type=int, default=8, help="pictures of a pair, rule and start")
    parser.add_argument("--restyle", type=Path, help="weights of restyle.py, which see other styles' pictures")
    parser.add_argument("--judges", type=Path, nargs="+", default=[], help="further judges, which choose")
    parser.add_argument("--keep", type=int, default=5, help="pictures of a pair that they keep")
    parser.add_argument("--sides", type=int, nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--target", type=Path, default=Path(".data/training/dreams.safetensors"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pairs = load_pairs(args.data)
    trained, missing = [p for p in pairs if not p.held_out], [p for p in pairs if p.held_out]
    judges = [load_judge(file, 1 + max(p.concept for p in pairs), args.device) for file in args.judges]
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    beside = None
    if args.restyle:
        load_restyling(pipe.transformer, args.restyle)
        beside = places_by_style(trained + missing, len(trained))[len(trained) :].to(args.device)
    pipe.vae.float()  # which encodes the real pictures as in training
    below, result = other_styles(trained + missing, len(trained))[len(trained) :], {}
    pictures = load_pictures(trained).to(args.device)
    for side in args.sides:
        dreams = dreams_of(below, args.rules, args.starts, args.each, seed=side)
        real = scaled_latents(pipe.vae, pictures, side, torch.float32)
        latents, worth = dream(pipe, missing, dreams, real, beside, judges, side)
        chosen = best(dreams, worth, args.keep if judges else len(dreams))
        result[str(side)] = latents[chosen]
        result["pairs"] = torch.tensor(
            [(missing[p].concept, missing[p].style) for p in (dreams[i].pair for i in chosen)]
        )
        print(f"{side} px: {len(dreams)} pictures, {len(chosen)} kept", flush=True)
        if judges:
            kinds, sure = Counter((dreams[i].rule, dreams[i].start) for i in chosen), (worth.exp(), worth.exp()[chosen])
            print(f"  of both sure {sure[0].mean():.3f}, of those kept {sure[1].mean():.3f}: {dict(kinds)}", flush=True)
    save_file(result, args.target)


if __name__ == "__main__":
    main()
