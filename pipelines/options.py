"""Options that several commands of `dit-accel` take alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (or set DIT_ACCEL_DEBUG=1).")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]

Profile = Annotated[Path | None, typer.Option(help="What calibrate wrote for this model and recipe.")]
Density = Annotated[float | None, typer.Option(help="Share of token pairs to compute, above 0, up to 1.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting of the recipe; repeatable.")
]

Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Frames = Annotated[int | None, typer.Option(help="Frames of a clip.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What to keep away from.")]
Guidance = Annotated[float | None, typer.Option(help="The pipeline's guidance_scale.")]
TrueCfg = Annotated[float | None, typer.Option(help="The pipeline's true_cfg_scale; 2 with a negative prompt on Flux.")]
TextLength = Annotated[int | None, typer.Option(help="The pipeline's max_sequence_length.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on CUDA, fp32 on a CPU.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
