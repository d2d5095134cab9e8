"""A sheet of drawn clips, five frames of each, and a few GIFs.

python video_sheet.py --clips .data/video/clips.npz --target docs/images/emoji-wan-sheet.png --gifs docs/images
"""

import argparse
from pathlib import Path

import numpy as np
from data import load_pairs
from PIL import Image, ImageDraw, ImageFont

COLUMNS, COUNT, CELL, LABEL = 2, 26, (112, 84), 18
GIFS = ("left", "clockwise", "passing", "before right")  # the motions shown


def sheet(drawn: dict[str, np.ndarray], held_out: list[bool]) -> Image.Image:
    """The first COUNT clips: with the motions in turn, two of each motion."""
    frames = drawn["strips"].shape[1]
    rows = -(-COUNT // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (frames * CELL[0] + 8), rows * (CELL[1] + LABEL)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=11)
    for place in range(min(COUNT, len(held_out))):
        x, y = place % COLUMNS * (frames * CELL[0] + 8), place // COLUMNS * (CELL[1] + LABEL)
        for i, frame in enumerate(drawn["strips"][place]):
            corner = (x + i * CELL[0], y + LABEL)
            page.paste(Image.fromarray(frame).resize(CELL, Image.Resampling.LANCZOS), corner)
            pen.rectangle((*corner, corner[0] + CELL[0] - 1, corner[1] + CELL[1] - 1), outline="lightgrey")
        caption = ("* " if held_out[place] else "") + str(drawn["captions"][place])
        pen.text((x + 4, y + 3), caption, fill="firebrick" if held_out[place] else "black", font=font)
    return page


def save_gif(film: np.ndarray, target: Path) -> None:
    """Every second frame, at half the clip's 16 frames a second."""
    frames = [Image.fromarray(f).quantize(64, dither=Image.Dither.NONE) for f in film[::2]]
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=125, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--gifs", type=Path, help="folder for a GIF each of a few motions")
    args = parser.parse_args()
    pairs, drawn = load_pairs(args.data), dict(np.load(args.clips))
    args.target.parent.mkdir(parents=True, exist_ok=True)
    sheet(drawn, [pairs[i].held_out for i in drawn["subjects"]]).save(args.target, optimize=True)
    if args.gifs:
        args.gifs.mkdir(parents=True, exist_ok=True)
        asked = drawn["asked"][: len(drawn["films"])].tolist()
        for motion in GIFS:
            if motion in asked:
                film = drawn["films"][asked.index(motion)]
                save_gif(film, args.gifs / f"emoji-wan-{motion.replace(' ', '-')}.gif")


if __name__ == "__main__":
    main()
