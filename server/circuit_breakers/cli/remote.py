"""The options of the commands that ask a server that runs."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["DEFAULT_URL", "ApiKeyOption", "UrlOption"]

DEFAULT_URL = "http://127.0.0.1:8000"
UrlOption = Annotated[str, typer.Option("--url", help="The server.")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key", help="Key, where the server wants one.", envvar="CIRCUIT_BREAKERS_API_KEY"
    ),
]
