"""Prepare the training pictures: four drawing styles of the same concepts, cut out at 256 px.

Everything comes from npm packages (see README.md for their licences). The result is a folder with one
lossless WebP with alpha a picture and `pairs.json`, which also names the style x concept pairs never trained on.
`extras.json` lists pictures of further concepts, mostly trained without their names: they teach what a style looks
like. Their words are not shipped.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d")
SIZE = 256
HELD_OUT_SHARE = 0.08
EXTRA_CONCEPTS = 800
EXTRA_GROUPS = (0, 1, 3, 4, 5, 6, 7)  # all but skin tones, signs and flags
SHOWN = ("taco",)  # the example of the documentation must be drawn well, so all its styles are trained
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent 3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "labels": "emojibase-data@17.0.0",
}


@dataclass(frozen=True)
class Pair:
    """One picture: a concept in a style."""

    concept: int
    label: str
    tags: tuple[str, ...]
    style: int
    held_out: bool
    path: Path
    extra: bool = False  # of a further concept, which the shipped model need not know by name

    @property
    def caption(self) -> str:
        return f"{self.label}, {STYLES[self.style]} style"


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack one npm package; a second call finds it unpacked."""
    target = folder / package.strip("@").replace("/", "-")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(target, filter="data")
    return target / "package"


def plain_code(hexcode: str) -> str:
    """Codepoints without the variation selector, which the packages use differently."""
    return hexcode.lower().replace("-fe0f", "")


def plain_label(label: str) -> str:
    return label.lower().replace("\u2019", "")


def cut_out(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def on_white(cutouts: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 4, H, W] with alpha to [N, 3, H, W] on white."""
    alpha = cutouts[:, 3:].int()
    return ((cutouts[:, :3] * alpha + 255 * (255 - alpha) + 127) // 255).byte()


class SvgStyle:
    """An iconify package: one JSON file of SVG bodies."""

    def __init__(self, folder: Path) -> None:
        self.names = {plain_code(c): n for c, n in json.loads((folder / "chars.json").read_text()).items()}
        self.icons = json.loads((folder / "icons.json").read_text())

    def render(self, code: str) -> Image.Image:
        import resvg_py

        icon = self.icons["icons"][self.names[code]]
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))

    def write(self, code: str, file: Path) -> None:
        cut_out(self.render(code)).save(file, lossless=True, method=6)


class WebpStyle:
    """A package of ready 256 px pictures, which are copied as they are: lossless they would be four times as large."""

    def __init__(self, folder: Path) -> None:
        self.names = {plain_code(p.stem): p for p in (folder / "assets").glob("*.webp")}

    def write(self, code: str, file: Path) -> None:
        with Image.open(self.names[code]) as picture:
            if picture.size == (SIZE, SIZE):
                shutil.copyfile(self.names[code], file)
            else:
                cut_out(picture).save(file, lossless=True, method=6)


def choose_held_out(labels: list[str], seed: int = 0) -> dict[int, int]:
    """Concept -> the one style of it that is held out, styles in turn so that each loses as many."""
    count = round(HELD_OUT_SHARE * len(labels) * len(STYLES))
    chosen = random.Random(seed).sample(range(len(labels)), count)
    return {concept: i % len(STYLES) for i, concept in enumerate(chosen) if labels[concept] not in SHOWN}


def choose_extras(records: list[dict], labels: list[str], sources: list[SvgStyle | WebpStyle]) -> list[dict]:
    """Other concepts that exist in all styles, at random."""
    known = set.intersection(*(set(source.names) for source in sources))
    fit = [r for r in records if r.get("group") in EXTRA_GROUPS and r["label"] not in labels]
    fit = [r for r in fit if plain_code(r["hexcode"]) in known]
    return random.Random(0).sample(fit, EXTRA_CONCEPTS)


def render_all(records: list[dict], sources: list[SvgStyle | WebpStyle], target: Path, prefix: str) -> list[dict]:
    """Write every concept in every style; a row each."""
    rows = []
    for concept, record in enumerate(records):
        for style, source in enumerate(sources):
            name = f"{prefix}{concept:03d}-{style}.webp"
            source.write(plain_code(record["hexcode"]), target / name)
            rows.append({"concept": concept, "style": style, "file": name})
    return rows


def prepare(target: Path, cache: Path, labels: list[str]) -> None:
    records = json.loads((fetch(PACKAGES["labels"], cache) / "en" / "data.json").read_text())
    by_label = {r["label"]: r for r in records}
    sources = [(WebpStyle if style == "fluent 3d" else SvgStyle)(fetch(PACKAGES[style], cache)) for style in STYLES]
    held_out = choose_held_out(labels)
    target.mkdir(parents=True, exist_ok=True)
    pairs = render_all([by_label[label] for label in labels], sources, target, "")
    for row in pairs:
        label = labels[row["concept"]]
        row["label"] = plain_label(label)
        row["tags"] = [t.lower() for t in by_label[label].get("tags", [])]
        row["held_out"] = held_out.get(row["concept"]) == row["style"]
    chosen = choose_extras(records, labels, sources)
    extras = render_all(chosen, sources, target, "extra-")
    for row in extras:
        label = plain_label(chosen[row["concept"]]["label"])
        row |= {"label": label, "tags": [], "held_out": False, "extra": True}
    (target / "pairs.json").write_text(json.dumps(pairs, indent=0, ensure_ascii=False))
    (target / "extras.json").write_text(json.dumps(extras, indent=0))


def load_pairs(folder: Path, file: str = "pairs.json") -> list[Pair]:
    rows = json.loads((folder / file).read_text())
    return [
        Pair(
            r["concept"],
            r["label"],
            tuple(r["tags"]),
            r["style"],
            r["held_out"],
            folder / r["file"],
            r.get("extra", False),
        )
        for r in rows
    ]


def load_cutouts(pairs: list[Pair]) -> torch.Tensor:
    """All pictures with alpha as uint8 [N, 4, 256, 256]."""

    def read(pair: Pair) -> np.ndarray:
        return np.asarray(Image.open(pair.path).convert("RGBA"))

    with ThreadPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(read, pairs)))).permute(0, 3, 1, 2).contiguous()


def load_pictures(pairs: list[Pair]) -> torch.Tensor:
    """All pictures on white as uint8 [N, 3, 256, 256]."""
    return torch.cat([on_white(load_cutouts(pairs[i : i + 64])) for i in range(0, len(pairs), 64)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--cache", type=Path, default=Path(".data/npm"))
    parser.add_argument("--concepts", type=Path, default=Path(__file__).with_name("concepts.txt"))
    args = parser.parse_args()
    prepare(args.target, args.cache, args.concepts.read_text().split("\n")[:-1])
    pairs, extras = load_pairs(args.target), load_pairs(args.target, "extras.json")
    print(f"{len(pairs)} pictures, {sum(p.held_out for p in pairs)} held out; {len(extras)} of further concepts")


if __name__ == "__main__":
    main()
