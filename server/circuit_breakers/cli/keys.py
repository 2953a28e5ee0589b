"""`keys new`: makes an API key, shows it once, and prints what the policy file keeps of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from circuit_breakers.cli.apps import keys_app, reported_errors

__all__ = ["keys_new"]


@keys_app.command(
    "new",
    epilog="Example: `circuit-breakers keys new --id team-a --policy strict >> policies.toml`",
)
def keys_new(
    key_id: Annotated[
        str, typer.Option("--id", help="Whose key it is; a second key of an id rotates the first.")
    ],
    policy: Annotated[
        str | None, typer.Option(help="Policy that its requests run under. [the file's default]")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference or admin; may be repeated. [inference]"),
    ] = None,
    pepper_file: Annotated[
        Path | None,
        typer.Option(help="Secret that keys are hashed with. [$CIRCUIT_BREAKERS_PEPPER]"),
    ] = None,
) -> None:
    """Make an API key.

    The key goes to standard error, once; the lines for the policy file go to standard output.
    """
    with reported_errors(exit_code=2):
        from circuit_breakers.policies.api_keys import load_pepper, new_key
        from circuit_breakers.policies.key_table import key_table

        pepper = load_pepper(os.environ, pepper_file)
        key = new_key()
        table = key_table(key_id, pepper.hash(key), policy=policy, scope=scope)
    typer.echo(f"key of {key_id}, shown this once: {key}", err=True)
    typer.echo(table)
