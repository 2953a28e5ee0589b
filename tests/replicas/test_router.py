"""The chart's nginx.conf, before servers that fail in ways that a real one does not on demand."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from ..docker.tools import find_program
from ..server.api.conftest import free_port
from .replica import nginx_before

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = HEAD + b"3\r\nyes\r\n0\r\n\r\n"
BEGUN = HEAD + b"3\r\nyes\r\n"
FULL = b"HTTP/1.1 503 Unavailable\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nfull"
OLD = b"HTTP/1.0 200 OK\r\n\r\nyes"
"""To a request in HTTP/1.0, which has no chunks: whole or begun, it looks the same."""
GONE = None
"""A server that nobody runs any more."""


class Router(NamedTuple):
    """An nginx, and the bodies that came through it, by server."""

    url: str
    bodies: list[list[bytes]]


@contextmanager
def scripted(answer: bytes, bodies: list[bytes]) -> Iterator[int]:
    """Port of a server that gives every request `answer` and closes the connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            is_old = self.rfile.readline().endswith(b"HTTP/1.0\r\n")
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            bodies.append(self.rfile.read(length))
            self.wfile.write(OLD if is_old else answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def router_before(
    root: Path, *answers: bytes | None, max_requests_per_address: int = 128
) -> Iterator[Router]:
    bodies: list[list[bytes]] = [[] for _ in answers]
    with ExitStack() as stack:
        ports = [
            free_port() if answer is GONE else stack.enter_context(scripted(answer, received))
            for answer, received in zip(answers, bodies, strict=True)
        ]
        nginx = nginx_before(ports, find_program("nginx"), root, max_requests_per_address)
        url = stack.enter_context(nginx)
        yield Router(url, bodies)


def test_a_begun_answer_that_breaks_off_is_an_error_and_is_not_repeated(tmp_path: Path) -> None:
    with router_before(tmp_path, BEGUN, BEGUN) as router:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{router.url}/v1/completions", content=b"{}")
        assert sorted(len(received) for received in router.bodies) == [0, 1]


@pytest.mark.parametrize("first", [GONE, b"", FULL], ids=["gone", "died", "full"])
def test_an_answer_that_has_not_begun_comes_from_another_server(
    tmp_path: Path, first: bytes | None
) -> None:
    # As large as a body may be: it is sent a second time, and was in memory meanwhile.
    body = b"x" * 4194304
    with router_before(tmp_path, first, WHOLE) as router:
        for _ in range(4):
            answer = httpx.post(f"{router.url}/v1/completions", content=body)
            assert (answer.status_code, answer.text) == (200, "yes")
        assert router.bodies[1] == [body] * 4
        assert not [p for p in (tmp_path / "body").rglob("*") if p.is_file()]


def test_a_request_that_kills_servers_meets_two_of_them_at_most(tmp_path: Path) -> None:
    with router_before(tmp_path, b"", b"", b"", b"") as router:
        answer = httpx.post(f"{router.url}/v1/completions", content=b"{}")
        assert answer.status_code == 502
        assert sorted(len(received) for received in router.bodies) == [0, 0, 1, 1]


def test_one_address_cannot_fill_the_memory_with_bodies_that_never_end(tmp_path: Path) -> None:
    begun = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
        b"Content-Length: 4194304\r\nExpect: 100-continue\r\n\r\n"
    )
    with router_before(tmp_path, WHOLE, max_requests_per_address=2) as router, ExitStack() as stack:
        url = httpx.URL(router.url)
        for _ in range(2):
            held = stack.enter_context(socket.create_connection((url.host, url.port), timeout=30))
            held.sendall(begun)
            # From here on its body is waited for.
            assert held.recv(1024).startswith(b"HTTP/1.1 100 ")
        answer = httpx.post(f"{router.url}/v1/completions", content=b"{}")
        assert answer.status_code == 429
        # The kubelet's question is nobody's request.
        assert httpx.get(f"{router.url}/router-livez").status_code == 200
        assert router.bodies == [[]]


def test_a_full_house_says_so_each_time_and_nobody_is_left_out(tmp_path: Path) -> None:
    with router_before(tmp_path, FULL, FULL) as router:
        for _ in range(3):
            answer = httpx.post(f"{router.url}/v1/completions", content=b"{}")
            assert (answer.status_code, answer.text) == (503, "full")
            assert answer.headers["Retry-After"] == "1"
        assert [len(received) for received in router.bodies] == [3, 3]


def test_a_body_that_is_too_large_goes_nowhere(tmp_path: Path) -> None:
    with router_before(tmp_path, WHOLE) as router:
        answer = httpx.post(f"{router.url}/v1/completions", content=b"x" * 4194305)
        assert answer.status_code == 413
        assert router.bodies == [[]]


def test_metrics_are_nobodys_and_the_router_answers_for_itself(tmp_path: Path) -> None:
    with router_before(tmp_path, WHOLE) as router:
        assert httpx.get(f"{router.url}/metrics").status_code == 404
        assert httpx.get(f"{router.url}/router-livez").status_code == 200
        assert router.bodies == [[]]
