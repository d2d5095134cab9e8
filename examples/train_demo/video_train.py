"""Train emoji-wan in stages that are boxed by wall-clock seconds.

    torchrun --nproc-per-node 2 video_train.py --stages pictures,small,middle,final

A later call goes on from the weights and the VAE in the work folder, else from an exported pipeline (`--resume`). It
also runs on one GPU or, with `--shape tiny`, on a CPU.
"""

import argparse
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import build_tokenizer
from data import load_pairs
from diffusers import AutoencoderKLWan, WanPipeline
from export import load_weights, save_weights
from optimizer import Optimizer
from parallel import Group, join, leave, set_up_torch
from train import Clock
from video_model import SHAPES, Model, Shape
from video_render import draw_clips, load_for_clips, render, whole
from video_scenes import SceneTable, build_vocabulary, draw_scenes, tabulate
from video_vae import latents_of, reconstruction_psnr, set_scaling, train_vae


@dataclass(frozen=True)
class Kind:
    """One sort of batch: canvas, whole clips or single frames, samples a GPU, how many are new and how many kept."""

    height: int
    width: int
    batch: int
    fresh: int
    kept: int
    shift: float  # of the times toward noise; it grows with the tokens that show the same thing
    single: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    kinds: tuple[Kind, ...]
    quantise: bool = False


# Batches of about 65,000 tokens a GPU: larger ones took as many samples to learn from, in fewer steps, and learnt less.
MIDDLE = Kind(384, 512, 16, 1, 8192, 5.0)
LARGE = Kind(480, 832, 8, 1, 2048, 6.0)
STAGES = {
    "pictures": Stage((Kind(256, 256, 512, 64, 32768, 2.0, single=True),)),
    "small": Stage((Kind(256, 256, 48, 2, 8192, 4.0),)),
    "middle": Stage((MIDDLE,)),
    "final": Stage((replace(MIDDLE, share=0.6), replace(LARGE, share=0.4)), quantise=True),
}


@dataclass(frozen=True)
class Source:
    """What clips are made of."""

    cutouts: torch.Tensor
    table: SceneTable
    vae: AutoencoderKLWan


class Bank:
    """The latest clips of one kind as latents; rendering and encoding cost more than seeing a clip several times."""

    def __init__(self, kind: Kind, source: Source, dtype: torch.dtype) -> None:
        self.kind, self.source, self.dtype = kind, source, dtype
        self.made = 0
        self.latents = torch.empty(0)
        self.scenes = torch.empty(0)

    def add(self) -> None:
        source, kind = self.source, self.kind
        scenes = torch.randint(len(source.table.motions), (kind.fresh,), device=source.cutouts.device)
        clips = draw_clips(source.table, scenes, kind.height, kind.width)
        pixels = render(source.cutouts, clips, *whole(clips, kind.single))
        latents = latents_of(source.vae, pixels).to(self.dtype)
        if self.made == 0:
            self.latents = latents.new_empty(kind.kept, *latents.shape[1:])
            self.scenes = scenes.new_empty(kind.kept)
        places = torch.arange(self.made, self.made + kind.fresh, device=scenes.device) % kind.kept
        self.latents[places], self.scenes[places] = latents, scenes
        self.made += kind.fresh

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and caption tokens of one batch."""
        for _ in range(1 if self.made else 4):
            self.add()
        filled = min(self.made, self.kind.kept)
        chosen = torch.randint(filled, (self.kind.batch,), device=self.latents.device)
        return self.latents[chosen], self.source.table.tokens[self.scenes[chosen]]


def draw_times(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """Logit-normal times, pushed toward noise."""
    times = torch.randn(count, device=device).sigmoid()
    return shift * times / (1 + (shift - 1) * times)


def loss_of(model: Model, bank: Bank) -> torch.Tensor:
    """Rectified-flow loss of one batch."""
    clean, tokens = bank.draw()
    times = draw_times(len(clean), bank.kind.shift, clean.device)
    x0 = clean.float()
    noise = torch.randn_like(x0)
    noisy = torch.lerp(x0, noise, times.view(-1, 1, 1, 1, 1)).to(clean.dtype)
    return F.mse_loss(model(noisy, times, tokens).float(), noise - x0)


def run_stage(
    name: str,
    seconds: float,
    model: Model,
    banks: dict[Kind, Bank],
    optimizer: Optimizer,
    clock: Clock,
    group: Group,
) -> None:
    stage = STAGES[name]
    order = random.Random(name)  # the same on every process, so that all draw the same kind
    start, elapsed, since, samples, losses = time.time(), 0.0, time.time(), 0, []
    optimizer.refresh(stage.quantise)
    for step in range(10**9):
        if step % 10 == 0:
            elapsed = group.from_main(time.time() - start)
            if elapsed >= seconds:
                break
        kind = order.choices(stage.kinds, [k.share for k in stage.kinds])[0]
        loss = loss_of(model, banks[kind])
        loss.backward()
        optimizer.step(group, clock.rate(elapsed, optimizer.steps), stage.quantise)
        samples += kind.batch * group.world
        losses.append(loss.detach())
        if group.main and step % 10 == 9 and time.time() - since > 5:
            loss, speed = torch.stack(losses).mean().item(), samples / (time.time() - since)
            rate = clock.rate(elapsed, optimizer.steps)
            text = f"stage {name} {elapsed:.0f} s step {step + 1} loss {loss:.4f} {speed:.0f} samples/s rate {rate:.2f}"
            print(text, flush=True)
            since, samples, losses = time.time(), 0, []
    clock.before += seconds


def prepare_vae(
    args: argparse.Namespace, cutouts: torch.Tensor, table: SceneTable, shape: Shape, group: Group
) -> AutoencoderKLWan:
    """The VAE of an earlier call, or a newly trained one."""
    folder = args.work / "vae"
    for known in (folder, args.resume and args.resume / "vae"):
        if known and known.exists():
            vae = AutoencoderKLWan.from_pretrained(known)
            if group.main and known != folder:
                vae.save_pretrained(folder)
            return vae.to(group.device).eval()
    vae = train_vae(cutouts, table, shape, group, args.vae_seconds, args.vae_batch)
    set_scaling(vae, cutouts, table, 4 * args.vae_batch)
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=group.device)
    group.copy_main_([values])
    vae.register_to_config(latents_mean=values[0].tolist(), latents_std=values[1].tolist())
    if group.main:
        vae.save_pretrained(folder)
        print(f"vae PSNR {reconstruction_psnr(vae, cutouts, table, args.vae_batch):.2f} dB", flush=True)
    return vae


def load_pipeline_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Training weights back out of an exported pipeline."""
    pipe = WanPipeline.from_pretrained(folder)
    parts = {"transformer.": pipe.transformer, "text.": pipe.text_encoder}
    return {prefix + k: v for prefix, module in parts.items() for k, v in module.state_dict().items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--work", type=Path, default=Path(".data/video"), help="VAE and training weights")
    parser.add_argument("--resume", type=Path, help="pipeline folder of an earlier call")
    parser.add_argument("--stages", default="pictures,small,middle,final")
    parser.add_argument("--seconds", default="55,70,140,80", help="of each stage")
    parser.add_argument("--total", type=float, default=345, help="seconds of all stages of all calls")
    parser.add_argument("--before", type=float, default=0, help="seconds trained in earlier calls")
    parser.add_argument("--vae-seconds", type=float, default=90)
    parser.add_argument("--vae-batch", type=int, default=48)
    parser.add_argument("--scenes", type=int, default=65536)
    parser.add_argument("--batch", type=int, help="try the chain: this batch size and a 64 x 96 canvas everywhere")
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--pictures", type=int, help="train on the first few pairs only")
    return parser.parse_args()


def set_up(args: argparse.Namespace, group: Group) -> None:
    set_up_torch(group, seed=1000 + int(args.before))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.batch:
        for name, stage in STAGES.items():
            small = {"height": 64, "width": 96, "batch": args.batch, "fresh": args.batch, "kept": 64}
            kinds = tuple(replace(k, **small) for k in stage.kinds)
            STAGES[name] = Stage(kinds, stage.quantise)


def main() -> None:
    args, group = parse(), join()
    set_up(args, group)
    begin = time.time()
    shape, dtype = SHAPES[args.shape], torch.bfloat16 if group.device.type == "cuda" else torch.float32
    pairs = load_pairs(args.data)
    vocabulary = build_vocabulary(pairs)
    trained = [p for p in pairs if not p.held_out][: args.pictures]
    scenes = draw_scenes(trained, args.scenes, seed=int(args.before))
    table = tabulate(scenes, build_tokenizer(vocabulary), group.device)
    cutouts = load_for_clips(trained, group.device)
    vae = prepare_vae(args, cutouts, table, shape, group)

    model = Model(shape, len(vocabulary)).to(group.device)
    group.copy_main_([p.data for p in model.parameters()])
    optimizer = Optimizer(model, dtype)
    weights = load_weights(args.work) or (load_pipeline_weights(args.resume) if args.resume else {})
    if weights:
        optimizer.load_averaged({name: w.to(group.device) for name, w in weights.items()})
    if group.device.type == "cuda":
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if group.main:
        print(f"ready after {time.time() - begin:.0f} s: {len(trained)} pictures", flush=True)
    names = args.stages.split(",")
    source = Source(cutouts, table, vae)
    clock = Clock(args.total, args.before)
    for name, seconds in zip(names, map(float, args.seconds.split(",")), strict=False):
        banks = {kind: Bank(kind, source, dtype) for kind in STAGES[name].kinds}
        run_stage(name, seconds, model, banks, optimizer, clock, group)
        if group.main:
            save_weights(optimizer.averaged(), args.work)
    leave(group)


if __name__ == "__main__":
    main()
