"""The command's tree, and what every subcommand needs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from circuit_breakers.errors import CircuitBreakersError, ConfigError

__all__ = [
    "app",
    "attack_app",
    "audit_app",
    "bench_app",
    "data_app",
    "import_extra",
    "keys_app",
    "reported_errors",
]

app = typer.Typer(
    name="circuit-breakers",
    help="A guard for language models that lives inside the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure the guard's cost, and its training's.", no_args_is_help=True)
attack_app = typer.Typer(help="Attackers that adapt to a breaker.", no_args_is_help=True)
audit_app = typer.Typer(help="The audit log of trips and acts.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(attack_app, name="attack")
app.add_typer(audit_app, name="audit")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")


@contextmanager
def reported_errors(exit_code: int = 1) -> Iterator[None]:
    """An error of ours becomes its message and an exit code; anything else is a bug and shows."""
    try:
        yield
    except CircuitBreakersError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(exit_code) from error


def import_extra(module: str, *, extra: str) -> Any:
    """A module whose dependencies come with an optional extra.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this command needs {error.name!r}, which is not installed; "
            f"pip install 'circuit-breakers[{extra}]'"
        ) from error
