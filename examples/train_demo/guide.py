"""Draw trained and held-out pairs under rules of guidance, and judge them: where should guidance act?

    python guide.py --rules none "style 3" "style 3 below 0.9" "thing above 0.7, style 1.6, unnamed below 0.5"

A rule guides by a scale away from the same thing in no style, at all times or below one (1 is noise);
`thing above T` leaves the style out above T, `unnamed below T` the name below T, where the thing is there to be seen.
"""

import argparse
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from captions import UNK
from classifier import Judge, load_judge
from data import STYLES, Pair, load_pairs
from diffusers import FluxPipeline
from model import image_ids

SETTINGS = {128: (20, 4.0, 32), 256: (20, 7.0, 512)}  # steps, time shift, text length by side in pixels
RULE = re.compile(
    r"(?:thing above (?P<thing>[\d.]+))?(?:, )?(?:style (?P<scale>[\d.]+))?(?: below (?P<below>[\d.]+))?"
    r"(?:, )?(?:unnamed below (?P<unnamed>[\d.]+))?"
)
GIVEN = 3.5  # guidance, as the pipeline gives it; what it does there is settled by the export
Predict = Callable[[bool, bool], torch.Tensor]  # with the style or without, with the name or without
Texts = tuple[torch.Tensor, ...]  # what T5 and CLIP read, and T5's positions


def rule_of(text: str) -> Callable[[float, Predict], torch.Tensor]:
    """Return the velocity at a time, from predictions with and without the style and the name."""
    found = RULE.fullmatch("" if text == "none" else text)
    if found is None:
        raise SystemExit(f"rule {text!r}: expected none, or as 'thing above 0.7, style 1.6 below 0.9'")
    defaults = {"thing": 2, "scale": 1, "below": 2, "unnamed": -1}
    thing, scale, below, unnamed = (float(found[name] or default) for name, default in defaults.items())

    def velocity(at: float, predict: Predict) -> torch.Tensor:
        named = at >= unnamed
        if at > thing:
            return predict(False, named)
        full = predict(True, named)
        return full if scale == 1 or at >= below else full + (scale - 1) * (full - predict(False, named))

    return velocity


def read(pipe: FluxPipeline, pairs: list[Pair], side: int, styled: bool, named: bool) -> Texts:
    """What the text encoders make of captions with the style or without, with the name or without."""
    things = [pair.label if named else UNK for pair in pairs]
    styles = [f"{STYLES[pair.style]} style" for pair in pairs]
    texts = [f"{t}, {s}" for t, s in zip(things, styles, strict=True)] if styled else things
    style = styles if styled else [""] * len(pairs)  # CLIP's part, whether or not it reads styles alone
    clip = texts if named else style
    return pipe.encode_prompt(clip, texts, device=pipe.transformer.device, max_sequence_length=SETTINGS[side][2])


@torch.no_grad()
def draw(
    pipe: FluxPipeline,
    pairs: list[Pair],
    seeds: list[int],
    rule: str,
    side: int = 128,
    first: float = 1.0,
    below: torch.Tensor | None = None,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packed, scaled latents [N, tokens, channels]; the noise of each by its seed, drawn on the CPU.

    With a `first` time under 1 they start from the latents `below` with so much noise over them. A transformer of
    `restyle.py` sees the latents `beside`.
    """
    steps, shift, _ = SETTINGS[side]
    device, dtype, velocity = pipe.transformer.device, pipe.transformer.dtype, rule_of(rule)
    texts = {
        (styled, named): read(pipe, pairs, side, styled, named) for styled in (True, False) for named in (True, False)
    }
    ids = image_ids(side, 1, device)
    x = torch.stack([torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
    times = torch.linspace(1, 1 / steps, steps)
    times = [first, *(t for t in (shift * times / (1 + (shift - 1) * times)).tolist() if t < first), 0.0]
    x = x if below is None else torch.lerp(below.to(x), x, first)
    for at, after in itertools.pairwise(times):

        def predict(styled: bool, named: bool, x: torch.Tensor = x, at: float = at) -> torch.Tensor:
            words, pooled, txt_ids = texts[styled, named]
            return pipe.transformer(
                hidden_states=(x if beside is None else torch.cat([x, beside.to(x)], -1)).to(dtype),
                timestep=torch.full((len(x),), at, device=device, dtype=dtype),
                guidance=torch.full((len(x),), GIVEN, device=device, dtype=dtype),
                pooled_projections=pooled,
                encoder_hidden_states=words,
                txt_ids=txt_ids,
                img_ids=ids,
                return_dict=False,
            )[0].float()

        x = x + (after - at) * velocity(at, predict)
    return x


@torch.no_grad()
def decode(pipe: FluxPipeline, x: torch.Tensor, side: int = 128) -> torch.Tensor:
    """Pictures [N, 3, side, side] in [0, 1]."""
    latents = pipe._unpack_latents(x, side, side, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return (pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def scores(judge: Judge, pictures: torch.Tensor, pairs: list[Pair]) -> str:
    concept, style = (logits.argmax(1).tolist() for logits in judge(pictures))
    things = sum(p.concept == c for p, c in zip(pairs, concept, strict=True)) / len(pairs)
    confused = [[0] * len(STYLES) for _ in STYLES]
    for pair, named in zip(pairs, style, strict=True):
        confused[pair.style][named] += 1
    right = sum(confused[i][i] for i in range(len(STYLES))) / len(pairs)
    return f"things {things:.3f} style {right:.3f} {confused}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--judge", type=Path, default=Path(".data/training/classifier.safetensors"))
    parser.add_argument("--rules", nargs="+", default=["none"])
    parser.add_argument("--trained-every", type=int, default=12)
    parser.add_argument("--held-out-every", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pairs = load_pairs(args.data)
    judge = load_judge(args.judge, 1 + max(p.concept for p in pairs), args.device)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    every = {"held out": args.held_out_every, "trained": args.trained_every}
    for rule in args.rules:
        start, said = time.time(), []
        for name, step in every.items():
            chosen = [i for i, p in enumerate(pairs) if p.held_out == (name == "held out")][::step]
            parts = [chosen[k : k + args.batch] for k in range(0, len(chosen), args.batch)]
            pictures = torch.cat([decode(pipe, draw(pipe, [pairs[i] for i in part], part, rule)) for part in parts])
            said.append(f"{name}: {scores(judge, pictures, [pairs[i] for i in chosen])}")
        print(f"{rule:32s} {'; '.join(said)}; {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
