"""Draw clips of scenes on the device: cut-out pictures carried over a canvas by their motion."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import Pair, load_cutouts
from video_scenes import MOTIONS, SceneTable

FRAMES = 81
PICTURE = 208  # pixels of the pictures that are carried over the canvas, about as large as they appear
SIDES = (190.0, 222.0)  # of a thing, in canvas pixels
SIDES_PASSING = (140.0, 164.0)
MARGIN, LONGEST_WAY, JITTER = 16.0, 320.0, 16.0
STRIPES, STRIPE_SPEED = 128.0, 3.0  # period in pixels, pixels a frame
FIELDS = ("right", "down", "bounces", "turns", "background", "passing")


@dataclass(frozen=True)
class Paths:
    """Where a thing is at each moment: centre, side and clockwise angle, each [B, T], in pixels and radians."""

    x: torch.Tensor
    y: torch.Tensor
    side: torch.Tensor
    angle: torch.Tensor


@dataclass(frozen=True)
class Clips:
    """The random choices of a batch of clips on a canvas: pictures [B, 2] and all else [B] or [B, colours, 3]."""

    height: int
    width: int
    pictures: torch.Tensor
    motions: torch.Tensor
    side: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    colours: torch.Tensor

    def field(self, name: str) -> torch.Tensor:
        values = torch.tensor([float(getattr(m, name)) for m in MOTIONS], device=self.motions.device)
        return values[self.motions]


def draw_clips(table: SceneTable, scenes: torch.Tensor, height: int, width: int) -> Clips:
    """Random sizes, places and stripe colours for the given scenes."""
    device, count = scenes.device, len(scenes)
    motions = table.motions[scenes]
    passing = torch.tensor([m.passing for m in MOTIONS], device=device)[motions]
    low, high = (torch.where(passing, a, b) for a, b in zip(SIDES_PASSING, SIDES, strict=True))
    jitter = torch.empty(2, count, device=device).uniform_(-JITTER, JITTER)
    return Clips(
        height,
        width,
        table.pictures[scenes],
        motions,
        torch.lerp(low, high, torch.rand(count, device=device)),
        width / 2 + jitter[0],
        height / 2 + jitter[1],
        1 - torch.rand(count, 2, 3, device=device) * torch.tensor([[0.35], [0.12]], device=device),
    )


def way(room: int, side: torch.Tensor) -> torch.Tensor:
    """Pixels slid along a canvas side of `room` pixels; on a small canvas the thing is cut off at both ends."""
    return torch.maximum((room - side - MARGIN).clamp(max=LONGEST_WAY), 0.75 * side)


def paths(clips: Clips, moments: torch.Tensor, second: bool = False) -> Paths:
    """Paths of the first or the second things at `moments` [B, T], 0 at the clip's start and 1 at its end."""
    sign = -1.0 if second else 1.0
    field = {name: clips.field(name)[:, None] for name in FIELDS}
    side, x, y = clips.side[:, None], clips.x[:, None], clips.y[:, None]
    ends = torch.tensor([m.scales for m in MOTIONS], device=moments.device).log()[clips.motions]
    x = x + sign * field["right"] * way(clips.width, side) * (moments - 0.5)
    y = y + field["down"] * way(clips.height, side) * (moments - 0.5)
    lane = torch.minimum(0.55 * side, torch.full_like(side, clips.height / 4))
    y = y - sign * field["passing"] * lane
    height = way(clips.height, side).clamp(max=160)
    hop = (math.pi * field["bounces"] * moments).sin().abs()
    y = y + (field["bounces"] > 0) * height * (0.5 - hop)
    scale = torch.lerp(ends[:, :1], ends[:, 1:], moments).exp()
    return Paths(x, y, side * scale, 2 * math.pi * field["turns"] * moments)


def carry(pictures: torch.Tensor, paths: Paths, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Premultiplied pictures [B, 4, S, S] along their paths, seen at pixels xs [B, W], ys [B, H]: [B, 4, T, H, W]."""
    right = xs[:, None, None, :] + 0.5 - paths.x[:, :, None, None]
    down = ys[:, None, :, None] + 0.5 - paths.y[:, :, None, None]
    cos = (2 * paths.angle.cos() / paths.side)[:, :, None, None]
    sin = (2 * paths.angle.sin() / paths.side)[:, :, None, None]
    grid = torch.stack([cos * right + sin * down, cos * down - sin * right], dim=-1)
    b, t, h, w, _ = grid.shape
    drawn = F.grid_sample(pictures, grid.view(b, t * h, w, 2), align_corners=False)
    return drawn.view(b, 4, t, h, w)


def ground(clips: Clips, frames: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
    """White, or stripes that move: [B, 3, T, 1, W]."""
    speed = clips.field("background")[:, None, None]
    phase = (xs[:, None, :] - speed * STRIPE_SPEED * frames[:, :, None]) / STRIPES
    mix = (0.5 + 8 * (2 * math.pi * phase).sin()).clamp(0, 1)[:, None, :, None]
    first, second = (c[:, :, None, None, None] for c in clips.colours.unbind(1))
    stripes = torch.lerp(first, second, mix)
    return torch.where((speed == 0)[..., None, None], torch.ones_like(stripes), stripes)


def render(
    cutouts: torch.Tensor, clips: Clips, frames: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor
) -> torch.Tensor:
    """Clips in [-1, 1], [B, 3, T, H, W], of the frames [B, T], columns xs [B, W] and rows ys [B, H] asked for."""
    moments = frames / (FRAMES - 1)
    canvas = ground(clips, frames, xs).expand(-1, -1, -1, ys.shape[1], -1)
    two = clips.field("passing").nonzero().squeeze(1)
    drawn = carry(cutouts[clips.pictures[:, 0]], paths(clips, moments), xs, ys)
    canvas = canvas * (1 - drawn[:, 3:]) + drawn[:, :3]
    if len(two):
        part = paths(clips, moments, second=True)
        part = Paths(part.x[two], part.y[two], part.side[two], part.angle[two])
        drawn = carry(cutouts[clips.pictures[two, 1]], part, xs[two], ys[two])
        canvas[two] = canvas[two] * (1 - drawn[:, 3:]) + drawn[:, :3]
    return 2 * canvas - 1


def whole(clips: Clips, single: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames, columns and rows of whole clips, or of one random frame each."""
    device, count = clips.motions.device, len(clips.motions)
    if single:
        frames = torch.randint(FRAMES, (count, 1), device=device).float()
    else:
        frames = torch.arange(FRAMES, device=device).float().expand(count, -1)
    xs = torch.arange(clips.width, device=device).float().expand(count, -1)
    return frames, xs, torch.arange(clips.height, device=device).float().expand(count, -1)


def window(clips: Clips, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames, columns and rows of random windows over the middle of the canvas."""
    device, count = clips.motions.device, len(clips.motions)
    start, left, top = torch.rand(3, count, 1, device=device)
    span = torch.arange(max(size, length), device=device).float()
    xs = clips.width / 2 - size + left * size + span[:size]
    ys = clips.height / 2 - size + top * size + span[:size]
    return (start * (FRAMES - length)).round() + span[:length], xs.round(), ys.round()


def load_for_clips(pairs: list[Pair], device: torch.device) -> torch.Tensor:
    """Premultiplied cut-outs [N, 4, PICTURE, PICTURE] in [0, 1]."""
    parts = []
    for start in range(0, len(pairs), 64):
        part = load_cutouts(pairs[start : start + 64]).to(device).float() / 255
        if part[:, 3].amin() == 1:
            raise ValueError("the pictures have no alpha: an older data.py made them; run data.py again")
        part[:, :3] *= part[:, 3:]
        parts.append(F.interpolate(part, size=(PICTURE, PICTURE), mode="area"))
    return torch.cat(parts)
