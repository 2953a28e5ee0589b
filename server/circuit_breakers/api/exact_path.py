"""Refuses every spelling of a path but the plain one.

A server unescapes %2f and %61 before it looks for a route, a proxy in front may not; then the
proxy's list of closed paths and the server's list of open ones disagree. No route here needs an
escape.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from circuit_breakers.api.errors import ApiError

__all__ = ["ExactPath"]


class ExactPath:
    """Middleware: a path with an escape in it is an unknown route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and b"%" in (scope.get("raw_path") or b""):
            error = ApiError(
                404,
                f"{scope['method']} {scope['raw_path'].decode('latin-1')}: not found; send the "
                "path without escapes",
                code="unknown_route",
            )
            await error.to_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
