"""Clients that ask for a long stream and take one byte of it a second."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from ..server.api.conftest import MODEL
from .house import KEY

__all__ = ["SlowClients", "slow_clients"]

_BODY = {
    "model": MODEL,
    "prompt": "Once upon a time in Rome",
    "max_tokens": 40,
    "ignore_eos": True,
    "stream": True,
    # Some 3 kB a token, so that a short answer is more than the kernel holds for a client.
    "logprobs": 20,
}
_RECEIVE_BYTES = 2048


class SlowClients(NamedTuple):
    sockets: list[socket.socket]

    def read_for(self, seconds: float) -> None:
        """A byte of each, once a second."""
        for _ in range(round(seconds)):
            began_s = time.monotonic()
            readable, _, _ = select.select(self.sockets, [], [], 0)
            for one in readable:
                try:
                    one.recv(1)
                except OSError:
                    continue  # cut off by the server
            time.sleep(max(0.0, 1.0 - (time.monotonic() - began_s)))

    def num_whole(self) -> int:
        """Answers that come to their end; reads what there is."""
        return sum(b"data: [DONE]" in _tail(one) for one in self.sockets)


def _tail(one: socket.socket) -> bytes:
    """The last of what there is to read."""
    one.settimeout(0.5)
    tail = b""
    with suppress(OSError):  # nothing more for half a second, or cut off
        while data := one.recv(65536):
            tail = (tail + data)[-100:]
    return tail


@contextmanager
def slow_clients(url: str, num: int) -> Iterator[SlowClients]:
    """`num` of them, all of which have asked."""
    address = urlsplit(url)
    body = json.dumps(_BODY).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ExitStack() as opened:
        sockets = []
        for _ in range(num):
            one = opened.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
            one.connect((address.hostname, address.port))
            one.sendall(head.encode() + body)
            sockets.append(one)
        yield SlowClients(sockets)
