"""Train a model that draws a picture again in another style, with which `dream.py` draws the pairs that have none.

    torchrun --nproc-per-node 4 restyle.py --seconds 250
    python dream.py --restyle .data/training/restyle.safetensors --rules "style 2, unnamed below 1.1" --starts 1 0.8

It starts from the exported transformer and sees, beside the noise, the other styles' pictures of the same thing as
further channels (InstructPix2Pix, Brooks et al. 2023, arXiv 2211.09800). It reads the style and never a name: what it
draws of a thing comes from the pictures that it sees and from styles learnt on all things. No picture of a held-out
pair is seen.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import build_vocabulary
from data import STYLES, Pair, load_pairs, load_pictures
from diffusers import FluxPipeline, FluxTransformer2DModel
from guide import GIVEN, SETTINGS, read
from model import image_ids
from optimizer import Optimizer
from parallel import Group, join, leave, set_up_torch
from safetensors.torch import load_file, save_file
from torch import nn
from train import Clock, Data, Kind, build_data, draw_below, draw_times, noised, run, scaled_latents, with_views

HIDDEN_SHARE = 0.2  # of the other styles' pictures: not shown
NO_STYLE_SHARE = 0.1  # of the pictures: drawn without reading the style, for guidance to lead away from
KINDS = tuple(Kind(side, 1, batch, (SETTINGS[side][2],)) for side, batch in ((128, 192), (256, 32)))


def widen(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Let it take a picture of every style after the noisy one; until trained it does not heed them."""
    old = transformer.x_embedder
    new = nn.Linear((1 + len(STYLES)) * old.in_features, old.out_features)
    with torch.no_grad():
        new.weight.copy_(F.pad(old.weight, (0, len(STYLES) * old.in_features)))
        new.bias.copy_(old.bias)
    transformer.x_embedder = new.to(old.weight.device, old.weight.dtype)
    return transformer


def load_restyling(transformer: FluxTransformer2DModel, file: Path) -> None:
    """Turn the exported transformer into the one trained here."""
    widen(transformer).load_state_dict(load_file(file))


def places_by_style(pairs: list[Pair], pictures: int) -> torch.Tensor:
    """For every pair the places of the same thing's pictures by style, -1 for its own or none [pairs, styles]."""
    places = {(p.extra, p.concept, p.style): i for i, p in enumerate(pairs[:pictures])}
    rows = [
        [places.get((p.extra, p.concept, s), -1) if s != p.style else -1 for s in range(len(STYLES))] for p in pairs
    ]
    return torch.tensor(rows)


def side_by_side(fetch: Callable[[torch.Tensor], torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The latents at places [B, styles] as channels [B, tokens, styles * channels], zero where the place is -1."""
    pictures = [fetch(p.clamp(min=0)) * (p >= 0)[:, None, None] for p in places.unbind(1)]
    return torch.cat(pictures, -1)


@torch.no_grad()
def texts_of(pipe: FluxPipeline, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read without a name for each style and, last, for none: T5's words and CLIP's summary."""
    things = [Pair(0, "", (), style, False, Path()) for style in range(len(STYLES))]
    parts = read(pipe, things, side, styled=True, named=False), read(pipe, things[:1], side, styled=False, named=False)
    words, pooled = (torch.cat([styled, none]).to(dtype) for styled, none in zip(*(p[:2] for p in parts), strict=True))
    return words, pooled


def loss_of(
    transformer: FluxTransformer2DModel,
    data: Data,
    styles: torch.Tensor,
    beside: torch.Tensor,
    kind: Kind,
    texts: tuple[torch.Tensor, torch.Tensor],
    ids: torch.Tensor,
) -> torch.Tensor:
    """Rectified-flow loss of one batch, each picture beside other styles' of the same thing in the same view."""
    device, batch = ids.device, (kind.batch,)
    pairs, views = (torch.randint(count, batch, device=device) for count in (data.pictures, data.views))
    times = draw_times(kind.batch, kind.pixels, device)

    def fetch(places: torch.Tensor) -> torch.Tensor:
        return data.clean(kind.pixels, places, views)

    noisy, target = noised(fetch(pairs), fetch(draw_below(data, pairs, times)), times)
    hidden = torch.rand(kind.batch, len(STYLES), device=device) < HIDDEN_SHARE
    seen = side_by_side(fetch, beside[pairs].masked_fill(hidden, -1))
    style = styles[pairs].masked_fill(torch.rand(batch, device=device) < NO_STYLE_SHARE, len(STYLES))
    words, pooled = texts
    predicted = transformer(
        hidden_states=torch.cat([noisy, seen], -1).to(words.dtype),
        timestep=times,
        guidance=torch.full_like(times, GIVEN),
        pooled_projections=pooled[style],
        encoder_hidden_states=words[style],
        txt_ids=ids.new_zeros(words.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return F.mse_loss(predicted.float(), target)


def train(
    pipe: FluxPipeline, data: Data, trained: list[Pair], kinds: tuple[Kind, ...], seconds: float, group: Group
) -> dict[str, torch.Tensor]:
    """Averaged weights of the widened transformer after so many seconds."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    texts = {k: texts_of(pipe, k.pixels, dtype) for k in kinds}
    ids = {k: image_ids(k.pixels, k.stride, group.device) for k in kinds}
    styles = torch.tensor([p.style for p in trained], device=group.device)
    beside = places_by_style(trained, len(trained)).to(group.device)
    transformer = widen(pipe.transformer).train()
    optimizer = Optimizer(transformer, dtype)
    if group.device.type == "cuda":
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def loss(kind: Kind, _: int) -> torch.Tensor:
        return loss_of(transformer, data, styles, beside, kind, texts[kind], ids[kind])

    run("restyle", seconds, kinds, loss, optimizer, Clock(seconds), group, quantise=False)
    return optimizer.averaged()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-flux"))
    parser.add_argument("--seconds", type=float, default=250)
    parser.add_argument("--batch", type=int, help="override every batch size")
    parser.add_argument("--pictures", type=int, help="train on the first few pairs only, a multiple of four")
    parser.add_argument("--target", type=Path, default=Path(".data/training/restyle.safetensors"))
    args, group = parser.parse_args(), join()
    set_up_torch(group, seed=3000)
    start = time.time()
    pairs, extras = (load_pairs(args.data, file)[: args.pictures] for file in ("pairs.json", "extras.json"))
    trained = [p for p in pairs if not p.held_out] + extras
    pictures = with_views(load_pictures(trained).to(group.device), len(extras))
    pipe = FluxPipeline.from_pretrained(args.model).to(group.device)
    kinds = tuple(replace(k, batch=args.batch or k.batch) for k in KINDS)
    latents = {k.pixels: scaled_latents(pipe.vae, pictures, k.pixels, torch.float16) for k in kinds}
    data = build_data(trained, [], build_vocabulary(pairs, extras), "style", latents, group)
    if group.main:
        print(f"ready after {time.time() - start:.0f} s: {len(pictures)} pictures", flush=True)
    weights = train(pipe, data, trained, kinds, args.seconds, group)
    if group.main:
        save_file({k: v.bfloat16().cpu().contiguous() for k, v in weights.items()}, args.target)
    leave(group)


if __name__ == "__main__":
    main()
