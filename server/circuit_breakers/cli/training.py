"""`train` and `report`: make a breaker, and write down again what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors

__all__ = ["report", "train"]


@app.command(
    epilog="Example: `circuit-breakers train --model smollm2-135m-instruct --out my-breaker`"
)
def train(
    out: Annotated[Path, typer.Option(help="Directory of the breaker, made new.")],
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the recipe's]")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe, or path of a TOML file.")
    ] = "smollm2-135m-instruct",
    data: Annotated[
        Path | None, typer.Option(help="Dataset directory. [built for the model]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the breaker. [the model's]")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted run left in OUT.work.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the breaker at OUT.")] = False,
) -> None:
    """Train, calibrate and evaluate a breaker for a model."""
    with reported_errors():
        load_recipe = import_extra("circuit_breakers_training.config", extra="train").load_recipe
        pipeline = import_extra("circuit_breakers_training.pipeline", extra="train")
        from rich.console import Console

        loaded = load_recipe(recipe)
        if model is not None:
            loaded = loaded.model_copy(update={"model": model})
        breaker = pipeline.run_training(
            loaded,
            out,
            name=name,
            data_dir=data,
            resume=resume,
            overwrite=overwrite,
            console=Console(stderr=True),
        )
    typer.echo(f"ok: breaker {breaker.manifest.name} {breaker.digest}")
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f"serve:  circuit-breakers serve --model {loaded.model} --breaker {out}")


@app.command(epilog="Example: `circuit-breakers report runs/my-breaker --out my-breaker.html`")
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Breaker directory.")],
    out: Annotated[Path, typer.Option(help="The page; the Markdown is written beside it.")],
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Write a saved breaker's report again, outside it: its own files never change."""
    with reported_errors():
        module = import_extra("circuit_breakers_training.report", extra="train")
        for path in module.rebuild_report(directory, out, overwrite=overwrite):
            typer.echo(f"ok: {path}")
