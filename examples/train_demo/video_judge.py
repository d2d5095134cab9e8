"""Score drawn clips: the picture judge on the subject alone, the tracker on the motion; beside them rendered clips.

python video_judge.py .data/video/clips.npz
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from captions import build_tokenizer
from classifier import Judge, load_judge
from data import Pair, load_pairs
from judge import scores
from video_export import SETTINGS
from video_render import draw_clips, load_for_clips, render, whole
from video_sample import Summary, choose_scenes, pack, summarise
from video_scenes import MOTIONS, Scene, build_vocabulary, tabulate


def real_clips(pairs: list[Pair], scenes: list[Scene], device: torch.device) -> dict[str, np.ndarray]:
    """Rendered clips of the scenes, summarised as drawn ones are: what judge and tracker say at best."""
    table = tabulate(scenes, build_tokenizer(build_vocabulary(pairs)), device)
    cutouts = load_for_clips(pairs, device)
    waiting = []
    with ThreadPoolExecutor() as pool:
        for i, scene in enumerate(scenes):
            clips = draw_clips(table, torch.tensor([i], device=device), SETTINGS["height"], SETTINGS["width"])
            pixels = (render(cutouts, clips, *whole(clips))[0] + 1) * 127.5
            clip = pixels.round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()
            waiting.append(pool.submit(summarise, clip, MOTIONS[scene.motion].name))
        summaries: list[Summary] = [w.result() for w in waiting]
    return pack(scenes, summaries, films=1)


def rows(judge: Judge, title: str, drawn: dict[str, np.ndarray], pairs: list[Pair], device: torch.device) -> None:
    subjects = [pairs[i] for i in drawn["subjects"]]
    right = drawn["asked"] == drawn["seen"]
    crops = torch.from_numpy(drawn["crops"]).permute(0, 3, 1, 2).to(device)
    for name, held_out in (("trained", False), ("held out", True)):
        places = [i for i, p in enumerate(subjects) if p.held_out == held_out]
        named = scores(judge, crops[places], [subjects[i] for i in places])
        motion = f"{right[places].mean():.3f}" if places else "-"
        print(f"| {title} | {name} | {motion} | {named} |", flush=True)


def by_motion(title: str, drawn: dict[str, np.ndarray]) -> None:
    """Which motions are seen as asked, and what the others are taken for."""
    parts = []
    for motion in MOTIONS:
        seen = drawn["seen"][drawn["asked"] == motion.name]
        wrong = sorted(set(seen) - {motion.name})
        parts.append(f"{motion.name} {(seen == motion.name).sum()}/{len(seen)}" + "".join(f" ({w})" for w in wrong))
    print(f"{title}: {', '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="*")
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--judge", type=Path, default=Path(".data/training/classifier.safetensors"))
    parser.add_argument("--trained-every", type=int, default=10, help="render every n-th trained pair")
    parser.add_argument("--held-out-every", type=int, default=1, help="render every n-th held-out pair")
    parser.add_argument("--limit", type=int, help="render the first few only")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    pairs = load_pairs(args.data)
    judge = load_judge(args.judge, 1 + max(p.concept for p in pairs), device)
    scenes = choose_scenes(pairs, args.trained_every, args.held_out_every)[: args.limit]
    torch.manual_seed(0)
    sets = {"rendered": real_clips(pairs, scenes, device)} | {f.stem: dict(np.load(f)) for f in args.clips}
    print("| clips | pairs | motion | concept top-1 | top-5 | style | count |\n|---|---|---|---|---|---|---|")
    for title, drawn in sets.items():
        rows(judge, title, drawn, pairs, device)
    for title, drawn in sets.items():
        by_motion(title, drawn)


if __name__ == "__main__":
    main()
