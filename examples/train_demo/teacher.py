"""Guidance built into the weights: a frozen copy of the model shows where its own guided prediction points.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) away from the caption that names the concept alone, so
that it is the style that gains, distilled at one scale (as Meng et al. 2023, arXiv 2210.03142, do at all), and only
below the highest noise, where it takes the thing with it (Kynkäänniemi et al. 2024, arXiv 2404.07724).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from captions import CONCEPT_ONLY
from torch import nn

GUIDED_BELOW = 0.9  # times, 1 is noise
STYLE_BELOW = (
    0.7  # of pairs without a picture: above, style only blurs how the thing is laid out, which it learnt elsewhere
)


class Teacher:
    """A frozen copy of the averaged weights. It must not learn on: chasing its own guided target made a model worse."""

    def __init__(self, model: nn.Module, averaged: dict[str, torch.Tensor], scale: float) -> None:
        self.scale = scale
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            parameter.data = averaged[name].to(parameter.dtype, copy=True)

    @torch.no_grad()
    def guided(self, times: torch.Tensor, captions: torch.Tensor, dreamt: torch.Tensor, call: Any) -> torch.Tensor:
        """Return what a model that names concept and style should predict, [B, tokens, channels].

        `times` [B]; `captions` [B] are the variants drawn; `dreamt` bool [B]: pairs without a picture;
        `call(model, captions)` predicts with other captions.
        """
        full = call(self.model, captions).float()
        without = call(self.model, torch.full_like(captions, CONCEPT_ONLY)).float()
        scale = torch.where(times < GUIDED_BELOW, self.scale, 1.0)
        scale = scale.masked_fill(dreamt & (times >= STYLE_BELOW), 0.0)
        return without + scale[:, None, None] * (full - without)
