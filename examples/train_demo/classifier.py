"""The judge: two small networks that name a picture's concept and style, trained on real trained pairs only.

    python classifier.py --seconds 40 --target .data/training/classifier.safetensors

Held-out pairs ask for a concept in a style it was never seen in, so colours are changed strongly for the
concept network, and the style network is a narrow one that sees pictures zoomed, shifted and turned. A second
judge, which `dream.py` chooses by, has another seed, and its style network sees further concepts too (`--further`).
"""

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from data import STYLES, Pair, load_pairs, load_pictures
from safetensors.torch import load_file, save_file
from torch import nn
from vae import shrink

SIDE = 128
STYLE_WIDTH = 16


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.skip(x) + self.second(F.relu(self.first(x))))


class Network(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 4 * width, 6 * width)
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(Residual(a, b, 2 if i else 1), Residual(b, b, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(widths[-1], classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class Judge(nn.Module):
    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.concept = Network(concepts)
        self.style = Network(len(STYLES), STYLE_WIDTH)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Concept and style logits of pictures [N, 3, 128, 128] in [0, 1]."""
        return self.concept(pictures), self.style(pictures)


def move(x: torch.Tensor, scale: tuple[float, float], shift: float, turn: float) -> torch.Tensor:
    """Random zoom, shift, turn and mirroring on a white ground."""
    n, device = len(x), x.device
    zoom = torch.empty(n, device=device).uniform_(*scale)
    angle = torch.empty(n, device=device).uniform_(-turn, turn) * math.pi / 180
    mirror = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    offset = torch.empty(n, 2, device=device).uniform_(-shift, shift)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = [
        torch.stack([cos * mirror, -sin, offset[:, 0]], 1),
        torch.stack([sin * mirror, cos, offset[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return 1 - F.grid_sample(1 - x, grid, align_corners=False)


def recolour(x: torch.Tensor, strength: float) -> torch.Tensor:
    """Random mix toward another colour basis, brightness and contrast; sometimes grey."""
    n, device = len(x), x.device
    mix = torch.eye(3, device=device) + strength * torch.randn(n, 3, 3, device=device)
    mix = mix / mix.sum(2, keepdim=True).clamp(min=0.3)  # white stays white
    mix = torch.where(torch.rand(n, 1, 1, device=device) < strength / 2, torch.full_like(mix, 1 / 3), mix)
    x = torch.einsum("nij,njhw->nihw", mix, x)
    contrast = 1 + strength * torch.randn(n, 1, 1, 1, device=device)
    return (1 - (1 - x) * contrast).clamp(0, 1)


def soften(x: torch.Tensor) -> torch.Tensor:
    """Blur for a third of the batch, noise for all."""
    third = len(x) // 3
    blurred = F.avg_pool2d(F.pad(x[:third], (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.cat([blurred, x[third:]]) + 0.03 * torch.rand((), device=x.device) * torch.randn_like(x)


def concept_view(x: torch.Tensor) -> torch.Tensor:
    return soften(recolour(move(x, (0.75, 1.2), 0.15, 12), 0.2))


def style_view(x: torch.Tensor) -> torch.Tensor:
    moved = recolour(move(x, (0.75, 1.2), 0.15, 20), 0.05)
    return moved + 0.02 * torch.rand((), device=x.device) * torch.randn_like(moved)


def train(pairs: list[Pair], pictures: torch.Tensor, seconds: float, batch: int, concepts: int) -> Judge:
    """Train on pictures [N, 3, SIDE, SIDE]; those of further concepts come last and teach the style network alone."""
    device, known = pictures.device, sum(not p.extra for p in pairs)
    judge = Judge(concepts).to(device, memory_format=torch.channels_last)
    concept = torch.tensor([p.concept for p in pairs], device=device)
    style = torch.tensor([p.style for p in pairs], device=device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=0.0, weight_decay=0.05)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        if step % 10 == 0:
            done = (time.time() - start) / seconds
        for settings in optimizer.param_groups:
            settings["lr"] = 3e-3 * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
        chosen, seen = (torch.randint(count, (batch,), device=device) for count in (known, len(pictures)))
        with torch.autocast(device.type, torch.bfloat16):
            named = judge.concept(concept_view(pictures[chosen]).contiguous(memory_format=torch.channels_last))
            styled = judge.style(style_view(pictures[seen]).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(named, concept[chosen], label_smoothing=0.1)
            loss = loss + F.cross_entropy(styled, style[seen], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 500 == 0:
            print(f"judge step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    return judge.eval()


def load_judge(file: Path, concepts: int, device: torch.device) -> Judge:
    judge = Judge(concepts)
    judge.load_state_dict({k: v if "num_batches" in k else v.float() for k, v in load_file(file).items()})
    return judge.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".data/emoji"))
    parser.add_argument("--target", type=Path, default=Path(".data/training/classifier.safetensors"))
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", action="store_true", help="teach the style network further concepts too")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pairs = load_pairs(args.data)
    trained = [p for p in pairs if not p.held_out]
    trained += load_pairs(args.data, "extras.json") if args.further else []
    pictures = shrink(load_pictures(trained).to(args.device).float() / 255, SIDE)
    judge = train(trained, pictures, args.seconds, args.batch, 1 + max(p.concept for p in pairs))
    weights = {k: v if "num_batches" in k else v.half() for k, v in judge.state_dict().items()}
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, args.target)


if __name__ == "__main__":
    main()
