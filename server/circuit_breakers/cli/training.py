"""`train`: make a breaker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors

__all__ = ["train"]


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
    typer.echo(f"report: {out / 'report.md'}")
    typer.echo(f"serve:  circuit-breakers serve --model {loaded.model} --breaker {out}")
