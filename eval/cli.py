"""The program `dit-accel`: the commands of `pipelines/cli.py` and `eval`, which only this room may know."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.pipelines import options
from dit_accel.pipelines.cli import app, main, print_json
from dit_accel.pipelines.options import Debug, Json
from dit_accel.pipelines.screen import screen

GROUPS, WINDOWS = 8, 3  # of `choose`


@app.command(name="eval")
def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The report, .html; rows lie beside it. Or the rows alone, .jsonl.")
    ],
    model: Annotated[str, typer.Option(help="Shipped model, folder, or Hub id.")] = "emoji-flux",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe, recipe file, 'oracle', or 'all'; repeatable. All, if none.")
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
    share: Annotated[str, typer.Option(help="Run this share of the candidates only, as 3/16; see join.")] = "1/1",
    batch: Annotated[
        int, typer.Option(min=1, help="Made at once, from seed, seed + 1, ...; times are of all, figures of the first.")
    ] = 1,
    looked: Annotated[int, typer.Option(min=0, help="First prompts in whose runs attention is looked into.")] = 1,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    negative_prompt: options.NegativePrompt = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    text_length: options.TextLength = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
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
    from .shares import Share

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
        share=Share.parse(share),
        looked=looked,
        batch=batch,
    )
    summary = job.rebuild(report, markdown) if report is not None else job.run(markdown)
    if as_json:
        print_json({"report": str(output), **summary.to_dict()})
    screen(stderr=as_json).print(summary.table())
    print(f"{output}: {len(summary.rows)} rows from {summary.path}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def join(
    rows: Annotated[list[Path], typer.Argument(help="Rows that the shares of one eval wrote, .jsonl or .jsonl.xz.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="One .jsonl file, or packed .jsonl.xz.")],
    force: options.Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put the rows of an eval's shares together, and their pictures."""
    from .shares import join as put
    from .store import is_cut

    found = put(rows, output, force)
    failed, cut = sum(row.error is not None for row in found), sum(map(is_cut, rows))
    if as_json:
        print_json({"output": str(output), "rows": len(found), "failed": failed, "cut": cut})
    without = f", {cut} cut short and left out" if cut else ""
    print(
        f"{output}: {len(found)} rows, {failed} of them failures{without}", file=sys.stderr if as_json else sys.stdout
    )


@app.command()
def choose(
    rows: Annotated[Path, typer.Argument(help="Rows that eval wrote, a .jsonl file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The mixtures, a .json or .yaml file.")],
    density: Annotated[list[float] | None, typer.Option(help="Repeatable; those of the rows, if none.")] = None,
    name: Annotated[str, typer.Option(help="What the mixture is called.")] = "auto",
    groups: Annotated[int, typer.Option(min=1, help="Parts of the model that choose for themselves.")] = GROUPS,
    windows: Annotated[int, typer.Option(min=1, help="Parts of the run that choose for themselves.")] = WINDOWS,
    force: options.Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose mixtures of recipes from the rows of a study: least error within each density."""
    from dit_accel.config import write_file

    from .choose import Chosen, check_target

    check_target(output, force)
    chosen = Chosen.of(rows, density or [], name, groups, windows)
    write_file(chosen.mixtures, output)
    if as_json:
        print_json({"output": str(output), **chosen.to_dict()})
    screen(stderr=as_json).print(chosen.table())
    print(output, file=sys.stderr if as_json else sys.stdout)


@app.command()
def judge(
    mixture: Annotated[Path, typer.Argument(help="What choose wrote.")],
    rows: Annotated[Path, typer.Argument(help="Rows of eval with that mixture and single recipes, a .jsonl file.")],
    markdown: Annotated[Path | None, typer.Option(help="Also write the verdicts as Markdown.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say by how much a mixture beats the best single recipe at each density, or that it doesn't."""
    from dit_accel.config import Mixtures, build, read_file

    from .judge import judge as hold

    found = hold(build(Mixtures, read_file(mixture), str(mixture)), rows)
    if markdown is not None:
        markdown.write_text(found.markdown(), encoding="utf-8")
    if as_json:
        print_json(found.to_dict())
    screen(stderr=as_json).print(found.table())


@app.command(name="tune-kernels")
def tune_kernels(
    seconds: Annotated[float, typer.Option(min=1, help="Time for all; what was found by then is kept.")] = 300,
    case: Annotated[list[str] | None, typer.Option(help="Call to tune, repeatable; all, if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Table to write; the one this GPU's calls read, if none.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Remove the table: back to the committed tiles.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure which kernel tiles are fastest on this GPU, each checked first, and use them from then on."""
    from .tune_job import TuneJob

    job = TuneJob(seconds, case or [], out)
    if reset:
        job.reset()
    else:
        job.run(as_json)


if __name__ == "__main__":
    main()
