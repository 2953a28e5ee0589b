"""`train`: make a breaker. `recipes`: how known ones are made. `report`: write down again what was
measured of one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors
from circuit_breakers.hardware import pick_device

__all__ = ["recipes", "report", "train"]


@app.command(
    epilog="Example: `circuit-breakers train --model smollm2-135m-instruct --out my-breaker`"
)
def train(
    out: Annotated[
        Path | None, typer.Option(help="Directory of the breaker, made new.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Built-in name, directory or hub id. [the recipe's]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Name of a recipe, or path of a TOML file. [the model's own, or auto]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the recipe as TOML, such as lora.rank=8; may be repeated.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset directory. [built for the model]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the breaker. [the model's]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; load no weights.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on with what an interrupted run left in OUT.work.")
    ] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the breaker at OUT.")] = False,
) -> None:
    """Train, calibrate and evaluate a breaker for a model."""
    if out is None and not dry_run:
        raise typer.BadParameter("expected a directory, or --dry-run", param_hint="--out")
    with reported_errors():
        resolution = import_extra("circuit_breakers_training.recipes.resolution", extra="train")
        recipe_files = import_extra("circuit_breakers_training.recipes.files", extra="train")
    with reported_errors(exit_code=2):
        overrides = [resolution.parse_override(text) for text in settings or []]
    if model is not None:
        overrides.append(resolution.Override(field="model", value=model, flag="--model"))
    with reported_errors():
        source = recipe or recipe_files.recipe_for_model(model)
        if dry_run:
            _show_dry_run(resolution, source, overrides, data)
            return
        assert out is not None
        pipeline = import_extra("circuit_breakers_training.pipeline", extra="train")
        from rich.console import Console

        resolved = resolution.resolve_recipe(source, overrides)
        if os.environ.get("RANK", "0") == "0":  # the main one of a launcher's processes
            typer.echo(resolved.describe())
        breaker = pipeline.run_training(
            resolved.recipe,
            out,
            name=name,
            data_dir=data,
            resume=resume,
            overwrite=overwrite,
            console=Console(stderr=True),
        )
    if breaker is None:  # a process that helped the main one, which reports
        return
    typer.echo(f"ok: breaker {breaker.manifest.name} {breaker.digest}")
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f"serve:  circuit-breakers serve --model {resolved.recipe.model} --breaker {out}")


def _show_dry_run(resolution: Any, source: str, overrides: list[Any], data: Path | None) -> None:
    planning = import_extra("circuit_breakers_training.recipes.dry_run", extra="train")
    skeleton = import_extra("circuit_breakers_training.recipes.skeleton", extra="train")
    resolved = resolution.resolve_recipe(source, overrides, find_model=skeleton.local_model_dir)
    typer.echo(resolved.describe())
    planned = planning.dry_run(
        resolved.recipe,
        skeleton.local_model_dir(resolved.recipe.model),
        data_dir=data,
        device=pick_device(),
    )
    typer.echo(planned.describe())
    if planned.refusal is not None:
        raise typer.Exit(1)


@app.command(epilog="Example: `circuit-breakers recipes`")
def recipes() -> None:
    """List the recipes that come with the package."""
    with reported_errors():
        recipe_files = import_extra("circuit_breakers_training.recipes.files", extra="train")
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "model", "notes", show_lines=True)
        for name in recipe_files.recipe_names():
            file = recipe_files.read_recipe_file(name)
            table.add_row(name, file.model or "any (--model)", file.notes)
    Console().print(table)


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
