"""Train emoji-flux in stages that are boxed by wall-clock seconds.

    torchrun --nproc-per-node 2 train.py --stages 32,64,128
    torchrun --nproc-per-node 2 train.py --stages 256,final

A later call goes on from the full checkpoint in the work folder if it is there, else from an exported
pipeline (`--resume`), so that a run may be cut over several machines. It also runs on one GPU or, with
`--shape tiny`, on a CPU.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import (
    FREE,
    LENGTH,
    OTHER,
    UNK,
    Reads,
    build_tokenizers,
    build_vocabulary,
    encode,
    variant_shares,
    variants,
)
from classifier import move
from data import STYLES, Pair, load_pairs, load_pictures
from diffusers import AutoencoderKL, FluxTransformer2DModel
from export import GUIDANCE, load_pipeline_weights, save_weights
from model import SHAPES, Shape, build_text_encoders, build_transformer, image_ids, pack
from optimizer import Optimizer
from parallel import Group, join, leave, set_up_torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel
from vae import encode_all, reconstruction_psnr, set_scaling, train_vae

TIME_SHIFT = {32: 2.0, 64: 3.0, 128: 5.0, 256: 8.0}
UNIFORM_SHARE = 0.4  # of the times: the shifted ones hardly visit low noise, where surfaces and edges are drawn
EXTRA_SHARE = 0.4  # of the pictures: ones of further concepts, so that style is learnt on many things
VIEWS = 5  # of every picture of further concepts, the first of them as it is
DREAM_SHARE = 0.15  # of the pictures of stage dreams: ones that the model drew itself under guidance (dream.py)
SWAP_SHARE = 0.3  # of the noisy pictures: another style's picture of the same thing below the noise
SWAP_FROM = 0.5  # only at times from here on, where the noise still hides details
DECAY_SHARE = 0.55


@dataclass(frozen=True)
class Kind:
    """One sort of batch: picture size, rope stride, pictures a GPU, text lengths, share of the steps."""

    pixels: int
    stride: int
    batch: int
    lengths: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    kinds: tuple[Kind, ...]
    quantise: bool = False
    dreams: bool = False


BOTH_SIZES = (Kind(256, 1, 32, (512,), share=0.7), Kind(128, 1, 192, (32, 512), share=0.3))
STAGES = {
    "32": Stage((Kind(32, 8, 1024, (32,)),)),
    "64": Stage((Kind(64, 4, 512, (32,)),)),
    "128": Stage((Kind(128, 2, 192, (32, 32, 512)), Kind(128, 1, 192, (32, 32, 512)))),
    "256": Stage(BOTH_SIZES),
    "final": Stage(BOTH_SIZES, quantise=True),
    "dreams": Stage(BOTH_SIZES, quantise=True, dreams=True),
}


class Model(nn.Module):
    """Transformer and text encoders, trained jointly."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.transformer: FluxTransformer2DModel = build_transformer(shape)
        self.clip: CLIPTextModel
        self.t5: T5EncoderModel
        self.clip, self.t5 = build_text_encoders(shape, vocabulary)

    def read(self, clip_tokens: torch.Tensor, t5_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.clip(clip_tokens).pooler_output, self.t5(t5_tokens)[0]

    def forward(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        guidance: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
        ids: torch.Tensor,
    ) -> torch.Tensor:
        pooled, words = text
        return self.transformer(
            hidden_states=noisy,
            timestep=times,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=words,
            txt_ids=ids.new_zeros(words.shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]


@dataclass
class Data:
    """Everything a batch is drawn from, on the device."""

    latents: dict[int, torch.Tensor]  # by pixels, packed and scaled: known concepts, each view of further ones, dreams
    known: int  # the pictures after them are of further concepts
    pictures: int  # the pairs after them have none, or dreams
    views: int  # of every picture of further concepts
    others: torch.Tensor  # [pairs, styles - 1]: the pictures of the same thing in the other styles
    clip_tokens: torch.Tensor  # [pairs, variants, tokens]
    t5_tokens: torch.Tensor
    shares: torch.Tensor  # of the caption variants

    def clean(self, pixels: int, pairs: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Latents of pictures, of further concepts' in the views asked for [B, tokens, channels]."""
        views = torch.where(pairs < self.pictures, views, self.views - 1)  # dreams lie after the last view
        extra = self.pictures - self.known
        return self.latents[pixels][torch.where(pairs < self.known, pairs, pairs + views * extra)].float()


def other_styles(pairs: list[Pair], pictures: int) -> torch.Tensor:
    """For every pair the places of the same thing's other pictures, repeated to a full row [pairs, styles - 1]."""
    places: dict[tuple[bool, int], list[int]] = {}
    for i, pair in enumerate(pairs[:pictures]):
        places.setdefault((pair.extra, pair.concept), []).append(i)
    rows = []
    for i, pair in enumerate(pairs):
        others = [j for j in places[pair.extra, pair.concept] if j != i] or [i]
        rows.append([others[k % len(others)] for k in range(len(STYLES) - 1)])
    return torch.tensor(rows)


def build_data(
    trained: list[Pair],
    missing: list[Pair],
    vocabulary: dict[str, int],
    clip_reads: Reads,
    latents: dict[int, torch.Tensor],
    group: Group,
) -> Data:
    """What is drawn from: trained pairs, those that ship first, and those whose pictures are not there."""
    pairs = trained + missing
    known = sum(not pair.extra for pair in trained)
    texts = [text for i, pair in enumerate(pairs) for text in variants(pair, seed=i)]
    # who reads the style alone must not see which pictures are unnamed
    styles = [text.replace(UNK, "") for text in texts]
    tokenizers = zip(build_tokenizers(vocabulary, clip_reads), (clip_reads, OTHER[clip_reads]), strict=True)
    clip, t5 = (
        encode(tokenizer, styles if reads == "style" else texts, LENGTH).view(len(pairs), -1, LENGTH)
        for tokenizer, reads in tokenizers
    )
    others = other_styles(pairs, len(trained)).to(group.device)
    views = 1 if len(trained) == known else (len(next(iter(latents.values()))) - known) // (len(trained) - known)
    tokens = clip.to(group.device), t5.to(group.device)
    return Data(latents, known, len(trained), views, others, *tokens, variant_shares().to(group.device))


def scaled_latents(vae: AutoencoderKL, pictures: torch.Tensor, pixels: int, dtype: torch.dtype) -> torch.Tensor:
    latents = (encode_all(vae, pictures, pixels) - vae.config.shift_factor) * vae.config.scaling_factor
    return pack(latents).to(dtype)


def moved(pictures: torch.Tensor) -> torch.Tensor:
    """Zoomed, shifted, turned and mirrored at random, uint8 [N, 3, side, side]; the styles of one thing alike."""
    things = pictures.unflatten(0, (-1, len(STYLES))).flatten(1, 2)
    parts = [(move(part / 255, (0.8, 1.15), 0.1, 15) * 255).round().byte() for part in things.split(128)]
    return torch.cat(parts).unflatten(1, (len(STYLES), -1)).flatten(0, 1)


def with_views(pictures: torch.Tensor, further: int) -> torch.Tensor:
    """The pictures, the last `further` of which are of further concepts, and after them more views of these."""
    extras = pictures[len(pictures) - further :]
    return torch.cat([pictures, *(moved(extras) for _ in range(VIEWS - 1))])


def draw_times(count: int, pixels: int, device: torch.device) -> torch.Tensor:
    """Logit-normal times, pushed toward noise the more tokens there are, mixed with uniform ones."""
    times = torch.randn(count, device=device).sigmoid()
    shift = TIME_SHIFT[pixels]
    shifted = shift * times / (1 + (shift - 1) * times)
    return torch.where(torch.rand_like(times) < UNIFORM_SHARE, torch.rand_like(times), shifted)


def draw_pairs(data: Data, batch: int, dream: bool) -> torch.Tensor:
    """Places of pictures and, for their shares, of further concepts' and of pairs without a picture."""
    device = data.clip_tokens.device
    pairs = torch.randint(data.known, (batch,), device=device)
    shares = (EXTRA_SHARE, data.known, data.pictures), (DREAM_SHARE * dream, data.pictures, len(data.clip_tokens))
    for share, first, end in shares:
        if end > first:
            other = torch.randint(first, end, (batch,), device=device)
            pairs = torch.where(torch.rand(batch, device=device) < share, other, pairs)
    return pairs


def with_dreams(data: Data, missing: list[Pair], file: Path) -> Data:
    """The data with a row for every dream in place of the pairs that have no picture."""
    dreams = load_file(file, device=str(data.others.device))
    places = {(pair.concept, pair.style): data.pictures + i for i, pair in enumerate(missing)}
    which = torch.tensor([places[pair] for pair in map(tuple, dreams["pairs"].tolist())], device=data.others.device)
    rows = torch.cat([torch.arange(data.pictures, device=which.device), which])
    latents = {k: torch.cat([v, dreams[str(k)].to(v.dtype)]) for k, v in data.latents.items()}
    changed = {name: getattr(data, name)[rows] for name in ("others", "clip_tokens", "t5_tokens")}
    return replace(data, latents=latents, **changed)


def draw_below(data: Data, pairs: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Places of the pictures to put below the noise: a share of them another style's.

    The caption's style then contradicts what shows through, so that the model learns to draw what it sees in the
    style that it reads, on pictures without a name too, where no name tells it the result.
    """
    other = data.others[pairs, torch.randint(data.others.shape[1], pairs.shape, device=pairs.device)]
    swap = (torch.rand_like(times) < SWAP_SHARE) & (times >= SWAP_FROM)
    return torch.where(swap, other, pairs)


def is_text_layer(name: str) -> bool:
    """The text encoders' layers. At the full rate T5's sums grew a thousandfold until all words looked alike."""
    return name.startswith(("clip.", "t5.")) and "embed" not in name and "shared" not in name


def pad(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(tokens, (0, length - tokens.shape[-1]))


def loss_of(model: Model, data: Data, kind: Kind, length: int, ids: torch.Tensor, dream: bool) -> torch.Tensor:
    """Rectified-flow loss of one batch."""
    device, dtype, batch = ids.device, data.latents[kind.pixels].dtype, kind.batch
    pairs = draw_pairs(data, batch, dream)
    times = draw_times(batch, kind.pixels, device)
    captions = torch.multinomial(data.shares, batch, replacement=True)
    captions = captions.masked_fill((captions < FREE) & (pairs >= data.pictures), 0)  # dreams are of whole pairs only
    views = torch.randint(data.views, (batch,), device=device).masked_fill(captions == 0, 0)  # named: as it is
    below = draw_below(data, pairs, times)
    x0 = data.clean(kind.pixels, pairs, views)
    noisy, target = noised(x0, data.clean(kind.pixels, below, views), times)
    text = model.read(data.clip_tokens[pairs, captions], pad(data.t5_tokens[pairs, captions], length))
    predicted = model(noisy.to(dtype), times, torch.full_like(times, GUIDANCE), text, ids)
    return F.mse_loss(predicted.float(), target)


def noised(x0: torch.Tensor, seen: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise over the latents `seen`, and the velocity that leads from there to `x0`: (noisy - x0) / t."""
    noise, t = torch.randn_like(x0), times[:, None, None]
    return torch.lerp(seen, noise, t), noise - x0 + (1 - t) / t.clamp(min=SWAP_FROM) * (seen - x0)


@dataclass
class Clock:
    """Learning-rate schedule over the whole training's seconds, which may span several calls."""

    total: float
    before: float = 0.0

    def rate(self, elapsed: float, step: int) -> float:
        left = 1 - (self.before + elapsed) / self.total
        return min(1.0, (step + 1) / 100) * min(1.0, max(left, 0.02) / DECAY_SHARE)


def run_stage(
    name: str, seconds: float, model: Model, data: Data, optimizer: Optimizer, clock: Clock, group: Group
) -> None:
    stage = STAGES[name]
    ids = {k: image_ids(k.pixels, k.stride, group.device) for k in stage.kinds}

    def loss(kind: Kind, length: int) -> torch.Tensor:
        return loss_of(model, data, kind, length, ids[kind], stage.dreams)

    run(name, seconds, stage.kinds, loss, optimizer, clock, group, stage.quantise)


def run(
    name: str,
    seconds: float,
    kinds: tuple[Kind, ...],
    loss_of_kind: Callable[[Kind, int], torch.Tensor],
    optimizer: Optimizer,
    clock: Clock,
    group: Group,
    quantise: bool,
) -> None:
    """Take steps for so many seconds, each on a batch of one kind and text length."""
    order = random.Random(name)  # the same on every process, so that all draw the same kind
    start, elapsed, since, pictures, losses = time.time(), 0.0, time.time(), 0, []
    optimizer.refresh(quantise)
    for step in range(10**9):
        if step % 10 == 0:
            elapsed = group.from_main(time.time() - start)
            if elapsed >= seconds:
                break
        kind = order.choices(kinds, [k.share for k in kinds])[0]
        loss = loss_of_kind(kind, order.choice(kind.lengths))
        loss.backward()
        optimizer.step(group, clock.rate(elapsed, optimizer.steps), quantise)
        pictures += kind.batch * group.world
        losses.append(loss.detach())
        if step % 10 == 9 and time.time() - since > 5:
            report(group, name, step + 1, losses, pictures / (time.time() - since), elapsed, optimizer, clock)
            since, pictures, losses = time.time(), 0, []
    clock.before += seconds


def report(
    group: Group,
    name: str,
    step: int,
    losses: list,
    rate: float,
    elapsed: float,
    optimizer: Optimizer,
    clock: Clock,
) -> None:
    if group.main:
        loss = torch.stack(losses).mean().item()
        scale = clock.rate(elapsed, optimizer.steps)
        speed = f"{rate:.0f} pictures/s rate {scale:.2f}"
        print(
            f"stage {name} {elapsed:.0f} s step {step} loss {loss:.4f} {speed}",
            flush=True,
        )


def prepare_vae(args: argparse.Namespace, pictures: torch.Tensor, shape: Shape, group: Group) -> AutoencoderKL:
    """The VAE of an earlier call, or a newly trained one."""
    for folder in (args.work, args.resume):
        if folder and (folder / "vae").exists():
            vae = AutoencoderKL.from_pretrained(folder / "vae")
            if group.main:
                vae.save_pretrained(args.work / "vae")
            return vae.to(group.device).eval()
    vae = train_vae(pictures, shape, group, args.vae_seconds, args.vae_batch)
    set_scaling(vae, pictures)
    if group.main:
        vae.to(memory_format=torch.contiguous_format).save_pretrained(args.work / "vae")
        psnr = {side: round(reconstruction_psnr(vae, pictures[::8], side), 2) for side in (64, 128, 256)}
        print(
            f"vae PSNR {psnr}, shift {vae.config.shift_factor:.4f}, scale {vae.config.scaling_factor:.4f}",
            flush=True,
        )
    return vae


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--work", type=Path, default=Path(".data/training"), help="checkpoint, VAE, exported weights")
    parser.add_argument("--resume", type=Path, help="pipeline folder of an earlier call")
    parser.add_argument("--stages", default="32,64,128,256,final")
    parser.add_argument("--seconds", default="55,80,235,150,270", help="of each stage")
    parser.add_argument("--total", type=float, default=790, help="seconds of all stages of all calls")
    parser.add_argument("--before", type=float, default=0, help="seconds trained in earlier calls")
    parser.add_argument("--vae-seconds", type=float, default=50)
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--batch", type=int, help="override every batch size")
    parser.add_argument("--clip-reads", choices=OTHER, default="style", help="its part of a caption; T5 reads the rest")
    parser.add_argument("--dreams", type=Path, default=Path(".data/training/dreams.safetensors"))
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--pictures", type=int, help="train on the first few pairs only, a multiple of four")
    return parser.parse_args()


def set_up(args: argparse.Namespace, group: Group) -> None:
    set_up_torch(group, seed=1000 + int(args.before))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.batch:
        for name, stage in STAGES.items():
            kinds = tuple(replace(k, batch=args.batch) for k in stage.kinds)
            STAGES[name] = replace(stage, kinds=kinds)


def main() -> None:
    args, group = parse(), join()
    set_up(args, group)
    begin = time.time()
    shape, dtype = SHAPES[args.shape], torch.bfloat16 if group.device.type == "cuda" else torch.float32
    pairs = load_pairs(args.data)
    extras = load_pairs(args.data, "extras.json")[: args.pictures]
    vocabulary = build_vocabulary(pairs, extras)
    trained = [p for p in pairs if not p.held_out][: args.pictures]
    missing = [p for p in pairs if p.held_out and any(p.concept == other.concept for other in trained)]
    trained += extras
    pictures = load_pictures(trained).to(group.device)
    vae = prepare_vae(args, pictures, shape, group)
    pictures = with_views(pictures, len(extras))
    names = args.stages.split(",")
    sizes = sorted({kind.pixels for name in names for kind in STAGES[name].kinds})
    latents = {s: scaled_latents(vae, pictures, s, dtype) for s in sizes}
    data = build_data(trained, missing, vocabulary, args.clip_reads, latents, group)

    model = Model(shape, len(vocabulary)).to(group.device)
    group.copy_main_([p.data for p in model.parameters()])
    optimizer = Optimizer(model, dtype, is_slow=is_text_layer)
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        optimizer.load_state(torch.load(checkpoint, map_location=group.device))
    elif args.resume:
        optimizer.load_averaged(load_pipeline_weights(args.resume))
    if group.device.type == "cuda":
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if group.main:
        print(
            f"ready after {time.time() - begin:.0f} s: {len(trained)} pictures, {optimizer.steps} steps done",
            flush=True,
        )
    clock = Clock(args.total, args.before)
    for name, seconds in zip(names, map(float, args.seconds.split(",")), strict=False):
        if STAGES[name].dreams:
            data = with_dreams(data, missing, args.dreams)
        run_stage(name, seconds, model, data, optimizer, clock, group)
        if group.main:
            torch.save(optimizer.state(), checkpoint)
            save_weights(optimizer.averaged(), args.work)
    leave(group)


if __name__ == "__main__":
    main()
