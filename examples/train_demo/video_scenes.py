"""What the clips show: the motions, random scenes of them, and the captions."""

import random
from dataclasses import dataclass

import torch
from captions import PAD, SPECIALS, UNK, word_splitter
from data import STYLES, Pair
from transformers import PreTrainedTokenizerFast

LENGTH = 24  # tokens trained on; the last one is always padding
OTHER = "{other}"  # stands in a phrase for the second thing


@dataclass(frozen=True)
class Motion:
    """What one thing does over a clip, and how captions say it. The first phrase is the main one."""

    name: str
    phrases: tuple[str, ...]
    right: int = 0  # direction over the canvas
    down: int = 0
    bounces: int = 0
    turns: float = 0.0  # clockwise
    scales: tuple[float, float] = (1.0, 1.0)  # at start and end
    background: int = 0  # direction of the stripes

    @property
    def passing(self) -> bool:
        return OTHER in self.phrases[0]


MOTIONS = (
    Motion("still", ("", "standing still")),
    Motion("left", ("sliding left", "moving left", "sliding to the left"), right=-1),
    Motion("right", ("sliding right", "moving right", "sliding to the right"), right=1),
    Motion("up", ("sliding up", "moving up", "rising"), down=-1),
    Motion("down", ("sliding down", "moving down", "sinking"), down=1),
    Motion("bounce", ("bouncing", "bouncing up and down", "hopping"), bounces=3),
    Motion("clockwise", ("spinning clockwise", "turning clockwise", "spinning"), turns=1.0),
    Motion("counterclockwise", ("spinning counterclockwise", "turning counterclockwise"), turns=-1.0),
    Motion("grow", ("growing", "getting bigger", "coming closer"), scales=(0.5, 1.15)),
    Motion("shrink", ("shrinking", "getting smaller", "going away"), scales=(1.15, 0.5)),
    Motion("passing", (f"passing {OTHER}", f"and {OTHER} passing", f"meeting {OTHER}"), right=1),
    Motion("before left", ("before stripes moving left", "in front of stripes sliding left"), background=-1),
    Motion("before right", ("before stripes moving right", "in front of stripes sliding right"), background=1),
)
MAIN_SHARE, EMPTY_SHARE = 0.55, 0.10
MAIN = "{thing} {motion}, {style} style"
TEMPLATES = (
    "{thing} {motion} in {style} style",
    "{style} style {label} {motion}",
    "{style} {label} {motion}",
    "{label} {motion}, {style} style",
    "{label} {motion}, {style}",
    "a clip of {thing} {motion}, {style} style",
    "a video of {thing} {motion} in {style} style",
    "an emoji of {thing} {motion}, {style} style",
    "{unknown} {thing} {motion}, {style} style",
    "{thing} {motion}",
)


@dataclass(frozen=True)
class Scene:
    """One thing (a place in the list of pairs), perhaps a second one, a motion (a place in MOTIONS), a caption."""

    subject: int
    other: int
    motion: int
    caption: str


def thing(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def fill(template: str, pair: Pair, other: Pair, phrase: str) -> str:
    text = template.format(
        thing=thing(pair.label),
        label=pair.label,
        motion=phrase.format(other=thing(other.label)),
        style=STYLES[pair.style],
        unknown=UNK,
    )
    return text.replace(" ,", ",").strip()


def main_caption(pair: Pair, other: Pair, motion: Motion) -> str:
    """Such as "a taco sliding left, noto style"."""
    return fill(MAIN, pair, other, motion.phrases[0])


def draw_caption(pair: Pair, other: Pair, motion: Motion, rng: random.Random) -> str:
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return ""
    if kind < EMPTY_SHARE + MAIN_SHARE:
        return main_caption(pair, other, motion)
    return fill(rng.choice(TEMPLATES), pair, other, rng.choice(motion.phrases))


def draw_scenes(pairs: list[Pair], count: int, seed: int) -> list[Scene]:
    """Random scenes; both things of one have the same style."""
    rng = random.Random(seed)
    of_style = [[i for i, p in enumerate(pairs) if p.style == s] for s in range(len(STYLES))]
    scenes = []
    for _ in range(count):
        subject, motion = rng.randrange(len(pairs)), rng.randrange(len(MOTIONS))
        other = rng.choice(of_style[pairs[subject].style])
        caption = draw_caption(pairs[subject], pairs[other], MOTIONS[motion], rng)
        scenes.append(Scene(subject, other, motion, caption))
    return scenes


def build_vocabulary(pairs: list[Pair]) -> dict[str, int]:
    texts = [t.format(thing="a an", label="", motion="", style="", unknown="") for t in (MAIN, *TEMPLATES)]
    texts += [phrase.format(other="") for motion in MOTIONS for phrase in motion.phrases]
    texts += [*STYLES, *(pair.label for pair in pairs)]
    splitter = word_splitter()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())}
    return {word: i for i, word in enumerate([*SPECIALS, *sorted(words - set(SPECIALS))])}


@dataclass(frozen=True)
class SceneTable:
    """Scenes as tensors on the device: pictures [N, 2], motions [N], caption tokens [N, LENGTH]."""

    pictures: torch.Tensor
    motions: torch.Tensor
    tokens: torch.Tensor


def tabulate(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast, device: torch.device) -> SceneTable:
    tokens = tokenizer(
        [s.caption for s in scenes], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids.int()
    if (tokens[:, -1] != tokenizer.convert_tokens_to_ids(PAD)).any():
        raise ValueError(f"a caption has {LENGTH} tokens or more; raise LENGTH")
    return SceneTable(
        torch.tensor([[s.subject, s.other] for s in scenes], device=device),
        torch.tensor([s.motion for s in scenes], device=device),
        tokens.to(device),
    )
