"""The program `dit-accel`: the commands of `pipelines/cli.py` and `eval`, which only this room may know."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.pipelines.cli import Debug, Json, app, main, print_json
from dit_accel.pipelines.screen import screen


@app.command(name="eval")
def evaluate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, an .html file; rows lie beside it.")],
    model: Annotated[str, typer.Option(help="Shipped model, folder, or Hub id.")] = "emoji-flux",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe, recipe file, or 'oracle'; repeatable. All, if none.")
    ] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="Also a recipe as calibrate found it; repeatable.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Repeatable; 0.5 and 0.3, if none.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable; the demo's own prompts, if none.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt a line.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeatable; 0, if none.")] = None,
    dense_steps: Annotated[float, typer.Option(help="Share of first steps dense, for every recipe alike.")] = 0.2,
    dense_layers: Annotated[int, typer.Option(help="First layers dense, for every recipe alike.")] = 0,
    rivals: Annotated[bool, typer.Option(help="Also fewer steps and diffusers' caches.")] = True,
    floors: Annotated[bool, typer.Option(help="Also the noise floors.")] = True,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    guidance: Annotated[float | None, typer.Option(help="The pipeline's guidance_scale.")] = None,
    true_cfg: Annotated[float | None, typer.Option(help="The pipeline's true_cfg_scale.")] = None,
    text_length: Annotated[int | None, typer.Option(help="The pipeline's max_sequence_length.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; bf16 on CUDA, fp32 on a CPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    report: Annotated[
        Path | None, typer.Option(help="Rows of an earlier study: only make the report anew.", show_default=False)
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank recipes against the unaccelerated model, the oracle, noise floors and rivals; go on where it stopped."""
    from dit_accel.config import build
    from dit_accel.pipelines.settings import Settings

    from .job import EvalJob

    asked = {
        "steps": steps,
        "height": height,
        "width": width,
        "frames": frames,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "text_length": text_length,
    }
    settings: Settings = build(Settings, asked, "eval")
    job = EvalJob(
        output=output,
        model=model,
        recipes=recipe,
        densities=density or [0.5, 0.3],
        prompts=prompt,
        prompt_file=prompts,
        seeds=seed or [0],
        settings=settings,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        rivals=rivals,
        floors=floors,
        profiles=profile or [],
        dtype=dtype,
        device=device,
    )
    summary = job.rebuild(report, markdown) if report is not None else job.run(markdown)
    if as_json:
        print_json({"report": str(output), **summary.to_dict()})
    screen(stderr=as_json).print(summary.table())
    print(f"{output}: {len(summary.rows)} rows from {summary.path}", file=sys.stderr if as_json else sys.stdout)


if __name__ == "__main__":
    main()
