"""One client's connection: uvicorn's HTTP/1.1 protocol with the bounds that it lacks.

llhttp refuses what request smuggling is made of: two lengths, length and chunks, bare line feeds,
folded lines. Added here:

    size    head, trailers and chunk framing together: neither llhttp nor uvicorn has a limit
    time    for a head to come in, for a client to take what it is sent, and for a body that is
            still coming after the answer
    form    one Host, a target that starts with '/' and has no fragment, no coding but chunked, no
            upgrade of a request with a body, which the parser would take for the other protocol's

Where one is broken, the connection ends: what follows on it could not be told apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["MAX_HEAD_BYTES", "Connection", "http_server"]

MAX_HEAD_BYTES = 64 * 1024
"""As h11 has it; a head that comes in one piece may be as large as one read of the socket."""
_FRAMING_PER_BYTE = 8
"""Bytes of chunk framing that a byte of body may bring along: a chunk of one byte takes 5."""
_KEEP_ALIVE_S = 75
"""Between two requests of a client. Above the 60 s of most load balancers: where they keep idle
connections longer than the server does, one sends a request into a connection that is closing."""
_FLUSH_S = 1
"""Seconds at the end, for what is still being written to clients."""


class _MalformedHeadError(Exception):
    """Ends the connection with a 400 that says why; ASCII."""


class Connection(HttpToolsProtocol):
    """One for each client."""

    timeout_s = 30.0
    """Seconds for each of the client's moves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_framing = 0
        """Bytes of the message so far that are not its body."""
        self._refusal: str | None = None
        self._move: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_move()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_framing += len(data)
        super().data_received(data)
        if self._num_framing > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.logger.warning("a head or framing over %d bytes was refused", MAX_HEAD_BYTES)
            self.transport.abort()
        # Blank lines between two messages end uvicorn's timer and begin no message.
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._move is None and not self.transport.is_closing():
            self._expect_move()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_move()

    def on_headers_complete(self) -> None:
        try:
            self._check_head()
        except _MalformedHeadError as e:
            self._refusal = str(e)  # httptools makes an error of its own of it
            raise
        self._move_made()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_framing -= len(body) * _FRAMING_PER_BYTE
        super().on_body(body)

    def on_message_complete(self) -> None:
        # What came behind it in the same read is not counted; one read is small.
        self._num_framing = 0
        self._move_made()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            # Answered before its body was there, as too large or unknown.
            self._expect_move()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(self._refusal or msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(self.timeout_s, self._end)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _check_head(self) -> None:
        num_hosts = 0
        version = self.parser.get_http_version()
        for name, value in self.headers:
            if name == b"host":
                num_hosts += 1
            elif name == b"transfer-encoding" and (version == "1.0" or value.lower() != b"chunked"):
                raise _MalformedHeadError("expected no Transfer-Encoding but chunked, in HTTP/1.1")
        if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
            raise _MalformedHeadError(f"got {num_hosts} Host headers, expected one")
        if not self.url.startswith(b"/") or b"#" in self.url:
            raise _MalformedHeadError("expected a target that is a path, without a fragment")
        if self.parser.should_upgrade() and self.parser.get_method() == b"POST":
            raise _MalformedHeadError(
                "got an Upgrade with a body, expected plain HTTP/1.1; turn upgrades off in the "
                "client (Java: HttpClient.Version.HTTP_1_1)"
            )

    def _expect_move(self) -> None:
        self._move_made()
        self._move = self.loop.call_later(self.timeout_s, self._end)

    def _move_made(self) -> None:
        if self._move is not None:
            self._move.cancel()
            self._move = None

    def _cancel_timers(self) -> None:
        self._move_made()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _end(self) -> None:
        # close() would first wait for the client to take what is left.
        self.transport.abort()


def http_server(app: ASGIApp, *, timeout_s: float) -> uvicorn.Server:
    """A server for the app; end it by `should_exit`, signals are its caller's.

    Args:
        timeout_s: for each of a client's moves.
    """
    return _HttpServer(
        uvicorn.Config(
            app,
            http=type("Connection", (Connection,), {"timeout_s": timeout_s}),
            # No route upgrades, and nothing believes who a header says the client is.
            ws="none",
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FLUSH_S,
        )
    )


class _HttpServer(uvicorn.Server):
    """Leaves the signals alone: uvicorn would raise them again, past the engine's shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
