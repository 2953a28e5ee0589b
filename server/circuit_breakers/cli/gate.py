"""`gate`: may this breaker, on this server, be shipped?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import app, import_extra, reported_errors
from circuit_breakers.cli.remote import DEFAULT_URL, ApiKeyOption, UrlOption

__all__ = ["gate"]


@app.command(
    epilog="Example: `circuit-breakers gate --url http://127.0.0.1:8000 --artifact my-breaker "
    "--data data --out gate`"
)
def gate(
    artifact: Annotated[Path, typer.Option(help="Breaker that should be in the server.")],
    data: Annotated[Path, typer.Option(help="Built dataset, whose test split is asked.")],
    out: Annotated[Path, typer.Option(help="Directory of the results, made new.")],
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Requests of each label that a check has answered, at most.")
    ] = 100,
    bars: Annotated[
        Path | None, typer.Option(help="TOML file with other bars. [the built-in ones]")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="identity, detection, live, prefill, wrappers, many-shot, past-tense, garak, "
            "pyrit, over-refusal, capability, overhead, conformance, bypass, leaks; may be "
            "repeated. What is left out in any other way fails the gate."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 64,
    degenerate_share: Annotated[
        float, typer.Option(help="Base-model benign answers that may count as degenerate.")
    ] = 0.05,
    unguarded_url: Annotated[
        str | None,
        typer.Option(
            help="The base model without a guard: for the check overhead, and in place of the base "
            "model's answers that are otherwise written here."
        ),
    ] = None,
) -> None:
    """Measure a served breaker against the bars that a release has to keep."""
    with reported_errors(exit_code=2):
        # The closed lists of fields are the server's own.
        import_extra("circuit_breakers.api.field_lists", extra="serve")
        evaluation = import_extra("circuit_breakers_training.evaluation.settings", extra="train")
        parsed = import_extra("circuit_breakers_training.gate.settings", extra="train")
        opened = import_extra("circuit_breakers_training.gate.target", extra="train")
        run = import_extra("circuit_breakers_training.gate.run", extra="train")
        settings = parsed.GateSettings(
            url=url,
            api_key=api_key,
            artifact=artifact,
            data=data,
            out=out,
            limit=limit,
            max_new_tokens=max_new_tokens,
            degenerate_share=degenerate_share,
            bars=bars,
            skip=evaluation.check_skips(skip or (), run.CHECKS),
            unguarded_url=unguarded_url,
        )
        from rich.console import Console

        progress = Console(stderr=True)
        target = opened.open_target(settings, progress)
    with reported_errors():
        report = import_extra("circuit_breakers_training.gate.report", extra="train")
        results = import_extra("circuit_breakers_training.evaluation.results", extra="train")
        result = run.run_gate(target, progress)
        results.write_results(out, report.gate_files(result))
    report.print_table(result, Console())
    typer.echo(f"report: {out / 'gate.html'}")
    if not result.passed:
        raise typer.Exit(1)
