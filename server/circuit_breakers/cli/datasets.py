"""`data`: training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import data_app, import_extra, reported_errors

__all__ = ["data_build"]


@data_app.command(
    "build",
    epilog="Example: `circuit-breakers data build --model smollm2-135m-instruct --out data`",
)
def data_build(
    out: Annotated[Path, typer.Option(help="Directory of the dataset.")],
    model: Annotated[
        str, typer.Option(help="Model that writes the texts: name, directory or hub id.")
    ] = "smollm2-135m-instruct",
    seed: Annotated[int, typer.Option(help="Seed of splits and sampling.")] = 0,
    extra_set: Annotated[
        list[str] | None,
        typer.Option(help="Public prompt set to add, from its package; may be repeated."),
    ] = None,
    prompt_limit: Annotated[
        int | None, typer.Option(help="Prompts of each list, for a quick trial. [all]")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another dataset in the directory.")] = (
        False
    ),
) -> None:
    """Build the training dataset of a model: written prompts, and texts by the model itself."""
    with reported_errors():
        built = import_extra("circuit_breakers_training.data.build", extra="train").build_dataset(
            out,
            model=model,
            seed=seed,
            extra_sets=tuple(extra_set or ()),
            prompt_limit=prompt_limit,
            overwrite=overwrite,
        )
    state = "found" if built.cached else f"built in {built.seconds:.0f} s"
    typer.echo(f"ok: {built.path} {state}")
    for split, counts in built.summary["counts"].items():
        typer.echo(f"{split}: {counts}")
