"""`data`: training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from circuit_breakers.cli.apps import data_app, import_extra, reported_errors
from circuit_breakers.errors import ConfigError

__all__ = ["data_build", "data_import"]

_T = TypeVar("_T")


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
    plain_template: Annotated[
        bool,
        typer.Option("--plain-template", help="For a base model: render turns as plain text."),
    ] = False,
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
            chat_template="plain" if plain_template else "model",
            overwrite=overwrite,
        )
    state = "found" if built.cached else f"built in {built.seconds:.0f} s"
    typer.echo(f"ok: {built.path} {state}")
    for split, counts in built.summary["counts"].items():
        typer.echo(f"{split}: {counts}")


@data_app.command(
    "import",
    epilog="Example: `circuit-breakers data import --format circuit-breakers --from "
    "circuit_breakers_train.json --limit 0 --repeat 1 --format xstest --from xstest.csv --limit 0 "
    "--repeat 50 --format ultrachat-first --from hf:HuggingFaceH4/ultrachat_200k:data/"
    "train_sft-*.parquet --limit 10000 --repeat 1 --out data`",
)
def data_import(
    out: Annotated[Path, typer.Option(help="Directory of the dataset.")],
    sources: Annotated[
        list[str],
        typer.Option(
            "--from", help="File, or hf:OWNER/NAME[@REVISION][:FILE] on the hub; may be repeated."
        ),
    ],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Format of all sources, or of each in turn; auto tells it from the columns. "
            "[auto]",
        ),
    ] = None,
    repeats: Annotated[
        list[int] | None,
        typer.Option(
            "--repeat",
            min=1,
            help="Times that each row stands in the train split; for all, or for each. [1]",
        ),
    ] = None,
    limits: Annotated[
        list[int] | None,
        typer.Option(
            "--limit", min=0, help="Rows taken, 0 for all; for all sources, or for each. [0]"
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="File of prompts to keep out, as of an evaluation set; may be repeated."),
    ] = None,
    missing_answers: Annotated[
        str, typer.Option(help="Prompts without an answer: refuse, drop, or write with --model.")
    ] = "refuse",
    model: Annotated[
        str | None,
        typer.Option(help="Measures lengths with its tokenizer, and writes missing answers."),
    ] = None,
    plain_template: Annotated[
        bool,
        typer.Option("--plain-template", help="For a base model: render turns as plain text."),
    ] = False,
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens above which a conversation counts as too long.")
    ] = 512,
    seed: Annotated[int, typer.Option(help="Seed of splits, limits and sampling.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace another dataset in the directory.")] = (
        False
    ),
) -> None:
    """Make a dataset from published data; options for each source come as often as --from."""
    with reported_errors(exit_code=2):
        names = _for_each("--format", formats, sources, "auto")
        times = _for_each("--repeat", repeats, sources, 1)
        rows = _for_each("--limit", limits, sources, 0)
    with reported_errors():
        spec = import_extra("circuit_breakers_training.data.sources", extra="train").SourceSpec
        imports = import_extra("circuit_breakers_training.data.imports", extra="train")
        built = imports.import_dataset(
            out,
            [
                spec(
                    location=location,
                    format=None if name == "auto" else name,
                    repeat=repeat,
                    limit=limit or None,
                )
                for location, name, repeat, limit in zip(sources, names, times, rows, strict=True)
            ],
            seed=seed,
            exclude=tuple(exclude or ()),
            missing_answers=missing_answers,
            model=model,
            chat_template="plain" if plain_template else "model",
            max_length=max_length,
            overwrite=overwrite,
        )
    state = "found" if built.cached else f"imported in {built.seconds:.0f} s"
    typer.echo(f"ok: {built.path} {state}")
    for line in _import_lines(built.summary):
        typer.echo(line)


def _for_each(
    option: str, values: Sequence[_T] | None, sources: Sequence[str], default: _T
) -> list[_T]:
    given = list(values or [default])
    if len(given) == 1:
        return given * len(sources)
    if len(given) != len(sources):
        raise ConfigError(
            f"got {option} {len(given)} times for {len(sources)} sources, expected it once for "
            "all or once for each --from, in the same order; add or remove some"
        )
    return given


def _import_lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"{s['from']} ({s['format']}): {s['read']} rows read, {s['kept']} kept, "
        f"dropped {s['dropped'] or 'none'}, {s['repeat']} x in train"
        for s in summary["sources"]
    ]
    lines += [f"{split}: {counts}" for split, counts in summary["counts"].items()]
    lines.append(f"groups of near duplicates: {summary['groups']}, largest {summary['largest']}")
    for label, lengths in (summary["token_lengths"] or {}).items():
        lines.append(f"tokens of {label} conversations: {lengths}")
    for label in ("harmful", "benign"):
        if label not in summary["counts"]["train"]:
            lines.append(f"note: no {label} conversation to train on; add a source with some")
    return lines
