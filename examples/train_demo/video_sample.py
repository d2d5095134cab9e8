"""Draw clips with the shipped folder and stock diffusers, and keep what the judge and the sheet need of each.

python video_sample.py --trained-every 10 --held-out-every 1 --target .data/video/clips.npz
"""

import argparse
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from classifier import SIDE
from data import Pair, load_pairs
from diffusers import WanPipeline
from sample import choose
from video_export import SETTINGS
from video_scenes import MOTIONS, Scene, main_caption
from video_tracker import motion_of, subject_crop

STRIP = 5  # frames of a clip kept for the sheet
SMALL = (160, 120)  # and their size


@dataclass(frozen=True)
class Summary:
    """What is kept of a clip: the motion seen, the subject alone, a strip of frames, and all frames, small."""

    motion: str
    crop: np.ndarray
    strip: np.ndarray
    small: np.ndarray


def summarise(clip: np.ndarray, asked: str) -> Summary:
    small = np.stack([cv2.resize(frame, SMALL, interpolation=cv2.INTER_AREA) for frame in clip])
    places = np.linspace(0, len(clip) - 1, STRIP).round().astype(int)
    return Summary(motion_of(clip), subject_crop(clip, asked, SIDE), small[places], small)


def pack(scenes: list[Scene], summaries: list[Summary], films: int) -> dict[str, np.ndarray]:
    """Arrays for an npz file; whole small films of the first few only."""
    return {
        "subjects": np.array([s.subject for s in scenes]),
        "captions": np.array([s.caption for s in scenes]),
        "asked": np.array([MOTIONS[s.motion].name for s in scenes]),
        "seen": np.array([s.motion for s in summaries]),
        "crops": np.stack([s.crop for s in summaries]),
        "strips": np.stack([s.strip for s in summaries]),
        "films": np.stack([s.small for s in summaries[:films]]),
    }


def choose_scenes(pairs: list[Pair], trained_every: int, held_out_every: int, seed: int = 0) -> list[Scene]:
    """Main captions of chosen pairs, shuffled, the motions in turn; second things are trained ones."""
    rng = random.Random(seed)
    subjects = choose(pairs, trained_every, held_out_every)
    rng.shuffle(subjects)
    scenes = []
    for i, subject in enumerate(subjects):
        others = [k for k, p in enumerate(pairs) if p.style == pairs[subject].style and not p.held_out]
        other, motion = rng.choice(others), i % len(MOTIONS)
        caption = main_caption(pairs[subject], pairs[other], MOTIONS[motion])
        scenes.append(Scene(subject, other, motion, caption))
    return scenes


def draw(pipe: WanPipeline, scenes: list[Scene], args: argparse.Namespace) -> Iterator[np.ndarray]:
    """uint8 clips [T, H, W, 3]. The noise is drawn on the CPU, the same for any device."""
    for start in range(0, len(scenes), args.batch):
        part = scenes[start : start + args.batch]
        clips = pipe(
            [s.caption for s in part],
            height=args.height,
            width=args.width,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=[torch.Generator().manual_seed(s.subject) for s in part],
            output_type="pt",
        ).frames
        yield from (clips.permute(0, 1, 3, 4, 2) * 255).round().byte().cpu().numpy()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--model", type=Path, default=Path("dit_accel/demo_models/emoji-wan"))
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--height", type=int, default=SETTINGS["height"])
    parser.add_argument("--width", type=int, default=SETTINGS["width"])
    parser.add_argument("--frames", type=int, default=SETTINGS["frames"])
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--guidance", type=float, default=SETTINGS["guidance"])
    parser.add_argument("--trained-every", type=int, default=10, help="draw every n-th trained pair")
    parser.add_argument("--held-out-every", type=int, default=1, help="draw every n-th held-out pair")
    parser.add_argument("--limit", type=int, help="draw the first few only")
    parser.add_argument("--films", type=int, default=26, help="keep all frames of the first few, small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    pairs = load_pairs(args.data)
    scenes = choose_scenes(pairs, args.trained_every, args.held_out_every)[: args.limit]
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    start = time.time()
    with ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(summarise, clip, MOTIONS[scene.motion].name)
            for scene, clip in zip(scenes, draw(pipe, scenes, args), strict=True)
        ]
        summaries = [w.result() for w in waiting]
    np.savez(args.target, allow_pickle=False, **pack(scenes, summaries, args.films))
    setting = f"{args.height} x {args.width} x {args.frames}, {args.steps} steps, guidance {args.guidance}"
    print(f"{args.target.name}: {len(scenes)} clips, {setting}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
