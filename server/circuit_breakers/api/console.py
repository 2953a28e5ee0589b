"""GET /console and its files: read once, at the start, and served as they are to everybody.

They hold nothing secret: every datum on the page comes from the API, with an admin's key. Each file
is a route of its own, so that no path is ever put together from what a client sends. They are built
from clients/console.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request, Response

from circuit_breakers.api.openapi import showing

__all__ = ["CONSOLE_PATHS", "add_console"]

_DIRECTORY = Path(__file__).parents[1] / "console"
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _File(NamedTuple):
    path: str
    """Of the URL."""
    operation: str
    """Its name in the OpenAPI document."""
    media_type: str
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return {
            "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            # Its name stays the same in another version: it is kept, and asked for each time.
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()[:32]}"',
        }


def _file(path: str, name: str, operation: str, media_type: str) -> _File:
    return _File(path, operation, media_type, (_DIRECTORY / name).read_bytes())


_FILES = (
    _file("/console", "index.html", "getConsole", "text/html"),
    _file("/console/assets/console.js", "assets/console.js", "getConsoleScript", "text/javascript"),
    _file("/console/assets/console.css", "assets/console.css", "getConsoleStyle", "text/css"),
)
CONSOLE_PATHS = frozenset(file.path for file in _FILES)
"""All of them; none wants a key."""


def add_console(app: FastAPI) -> None:
    """Adds a route for each file."""
    for file in _FILES:
        _add(app, file)


def _add(app: FastAPI, file: _File) -> None:
    headers = file.headers

    @app.get(**showing(file.path, file.operation, "The console, for admins.", file.media_type))
    async def show(request: Request) -> Response:
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(file.body, media_type=file.media_type, headers=headers)
