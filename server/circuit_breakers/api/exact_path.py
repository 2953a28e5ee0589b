"""Refuses every spelling of a path but the plain one.

A server unescapes %2f and %61 before it looks for a route, a proxy in front may not; then the
proxy's list of closed paths and the server's list of open ones disagree. The same goes for `..` and
for `;x`. The one route that needs an escape reads a model's name: those of the hub have a slash,
which OpenAI's clients escape.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from circuit_breakers.api.errors import ApiError

__all__ = ["ExactPath"]

_MODEL_WITH_SLASHES = re.compile(rb"/v1/models/[^%]+(?:%2[Ff][^%]+)*")


class ExactPath:
    """Middleware: a path with an escape, a `;`, a `.` or a `..` in it is an unknown route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_plain(scope):
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            error = ApiError(
                404,
                f"{scope['method']} {raw.decode('latin-1')}: not found; send the path without "
                "escapes, ';', '.' and '..'",
                code="unknown_route",
            )
            await error.to_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_plain(scope: Scope) -> bool:
    path: str = scope["path"]
    if ";" in path or not {".", ".."}.isdisjoint(path.split("/")):
        return False
    raw: bytes = scope.get("raw_path") or b""
    if b"%" not in raw:
        return True
    return scope["method"] == "GET" and _MODEL_WITH_SLASHES.fullmatch(raw) is not None
