"""The command line `dit-accel`; the modules beside it do the work, imported when a command needs them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, plan_command
from .options import Debug, Json
from .screen import FAILED, OneLineErrors, screen

app = typer.Typer(
    cls=OneLineErrors,
    help="Sparse attention for diffusers' diffusion transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Sparse attention for diffusers' diffusion transformers."""
    if version:
        from dit_accel import __version__

        print(f"dit-accel {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, such as 'taco, noto style'.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture (.png, .jpg, .webp) or clip (.mp4, .gif, .webp).")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Shipped model, folder, or Hub id; emoji-flux, or emoji-wan for a clip.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe or preset by name, or a YAML/JSON file; balanced, or the profile's, if none."),
    ] = None,
    profile: options.Profile = None,
    density: options.Density = None,
    set_: options.Set = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a clip, 1 to 120 (.gif: to 50).")] = None,
    negative_prompt: options.NegativePrompt = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    text_length: options.TextLength = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also run stock; write both side by side.")] = False,
    force: options.Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw a picture or a clip, accelerated, and say what was done."""
    from dit_accel.config import build

    from .job import Job
    from .settings import Settings

    overrides = parse_overrides(density, set_ or [])
    asked = {
        "steps": steps,
        "seed": seed,
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "text_length": text_length,
    }
    settings: Settings = build(Settings, asked, "generate")
    job = Job(prompt, output, model, recipe, overrides, settings, dtype, device, compare, force, profile)
    result = job.run()
    if as_json:
        print_json(result.to_dict())
    screen(stderr=as_json).print(result.made.report)
    print(result, file=sys.stderr if as_json else sys.stdout)


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What to draw, such as 'taco, noto style'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture of the call (.png, .jpg, .webp).")],
    site: Annotated[str, typer.Option(help="Attention site, by number from 0 or by name.")],
    step: Annotated[int, typer.Option(help="Denoising step, from 0.")],
    query: Annotated[
        str | None,
        typer.Option(
            metavar="FRAME,ROW,COLUMN", help="Token of the grid whose keys are drawn; the middle one, if none."
        ),
    ] = None,
    head: Annotated[list[int] | None, typer.Option(help="Repeatable; all heads, if none.")] = None,
    model: Annotated[str, typer.Option(help="Shipped model, folder, or Hub id.")] = "emoji-flux",
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe or preset by name, or a YAML/JSON file; draft, or the profile's, if none."),
    ] = None,
    profile: options.Profile = None,
    density: options.Density = None,
    set_: options.Set = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    negative_prompt: options.NegativePrompt = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    text_length: options.TextLength = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    force: options.Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold one attention call against the true attention and the best choice, as figures and a picture."""
    from dit_accel.config import build

    from .explain import ExplainJob, parse_query
    from .settings import Settings

    asked = {
        "steps": steps,
        "seed": seed,
        "height": height,
        "width": width,
        "frames": frames,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "text_length": text_length,
    }
    settings: Settings = build(Settings, asked, "explain")
    job = ExplainJob(
        prompt=prompt,
        output=output,
        site=int(site) if site.isdecimal() else site,
        step=step,
        query=parse_query(query),
        heads=head,
        model=model,
        recipe=recipe,
        overrides=parse_overrides(density, set_ or []),
        settings=settings,
        dtype=dtype,
        device=device,
        force=force,
        profile=profile,
    )
    look = job.run()
    if as_json:
        print_json({"output": str(output), **look.to_dict()})
    screen(stderr=as_json).print(look)
    print(output, file=sys.stderr if as_json else sys.stdout)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Shipped model, folder, or Hub id.")],
    recipe: Annotated[str, typer.Option(help="What to calibrate, by name, or a YAML/JSON file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile, a .json file.")],
    density: options.Density = None,
    set_: options.Set = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeatable; the demo's own prompts, if none.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt a line.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Queries looked at in each attention call.")] = 256,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of the run settled apart; 4 where the paper settles each step, else 1."),
    ] = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.Frames = None,
    negative_prompt: options.NegativePrompt = None,
    guidance: options.Guidance = None,
    true_cfg: options.TrueCfg = None,
    text_length: options.TextLength = None,
    dtype: options.Dtype = None,
    device: options.Device = "auto",
    force: options.Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Watch the unaccelerated model, and write down what each head needs for a recipe."""
    from dit_accel.config import build

    from .calibrate import CalibrateJob
    from .settings import Settings

    asked = {
        "steps": steps,
        "seed": seed,
        "height": height,
        "width": width,
        "frames": frames,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "true_cfg": true_cfg,
        "text_length": text_length,
    }
    settings: Settings = build(Settings, asked, "calibrate")
    overrides = parse_overrides(density, set_ or [])
    job = CalibrateJob(model, recipe, output, overrides, prompt, prompts, settings, rows, windows, dtype, device, force)
    result = job.run()
    if as_json:
        print_json(result.to_dict())
    else:
        print(result)


app.command()(plan_command.plan)


@app.command()
def recipes(as_json: Json = False, debug: Debug = False) -> None:
    """List the recipes and presets."""
    from .listing import recipe_rows, recipe_table

    if as_json:
        print_json({"recipes": recipe_rows()})
    else:
        screen().print(recipe_table())


@app.command()
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the models that ship with the package."""
    from .listing import model_rows, model_table

    if as_json:
        print_json({"models": model_rows()})
    else:
        screen().print(model_table())
        print("Any folder or Hub id of a diffusers pipeline with a transformer works as --model, too.")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this machine can run, and what to do about the rest."""
    from dataclasses import asdict

    from .doctor import examine
    from .listing import check_table

    checks = examine()
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        screen().print(check_table(checks))
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="What generate wrote.")], debug: Debug = False) -> None:
    """Print the settings written into a picture or clip."""
    from .provenance import read

    text = json.dumps(read(file), indent=2, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text))


def parse_overrides(density: float | None, pairs: list[str]) -> dict[str, Any]:
    """Turn `--density` and `--set key=value`, whose values are read as YAML, into recipe overrides."""
    import yaml

    from dit_accel.errors import ConfigError

    overrides: dict[str, Any] = {} if density is None else {"density": density}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set: expected KEY=VALUE, got {pair!r}.")
        if key in overrides:
            raise ConfigError(f"--set: {key} is given twice.")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set: the value of {key} is no valid YAML: {value!r}.") from None
    return overrides


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on one line."""
    print(json.dumps(data, allow_nan=False))


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings at import are not ours
    app()


if __name__ == "__main__":
    main()
