"""Bytes to the server and bytes back: no client library that would tidy a request up."""

from __future__ import annotations

import json
import socket
from typing import Any, NamedTuple

from ..server.api.conftest import MODEL, Server

__all__ = ["CHAT", "TRIP", "Reply", "exchange", "request"]

CHAT = "/v1/chat/completions"
TRIP: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Do you like the zebra?"}],
    "max_tokens": 4,
    "temperature": 0,
}
"""Trips on its prompt (breaker_for_words.py): what gets through in any shape is a bypass."""


class Reply(NamedTuple):
    """All that came back on one connection."""

    raw: bytes

    @property
    def statuses(self) -> list[int]:
        """Of each answer, in order."""
        return [int(part[:3]) for part in self.raw.split(b"HTTP/1.1 ")[1:]]

    @property
    def status(self) -> int:
        (status,) = self.statuses
        return status

    @property
    def body(self) -> bytes:
        return self.raw.split(b"\r\n\r\n", 1)[1]

    @property
    def code(self) -> Any:
        """Code of the OpenAI error."""
        return json.loads(self.body)["error"]["code"]


def exchange(server: Server, raw: bytes) -> Reply:
    """What the server answers until it closes the connection, which `raw` should ask for."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        answer = b""
        try:
            connection.sendall(raw)
            while piece := connection.recv(1 << 16):
                answer += piece
        except ConnectionError:
            pass
    return Reply(answer)


def request(
    target: str = CHAT,
    body: bytes | dict[str, Any] = b"",
    *headers: str,
    method: str = "POST",
    content_type: str = "application/json",
) -> bytes:
    """A whole request after which the connection is closed."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    stays = any(header.lower().startswith("connection:") for header in headers)
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: x",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(raw)}",
        *(() if stays else ("Connection: close",)),
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + raw
