"""Requests to a scripted server: what is sent, and when it is sent again."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from circuit_breakers.errors import ConfigError, RemoteServerError
from circuit_breakers.remote_server import RefusedError, RemoteServer

from ..local_server import answering, url_of


class Scripted:
    def __init__(self, url: str) -> None:
        self.url = url
        self.statuses = [200]
        """One for each request in turn; the last one stays."""
        self.body = b'{"error": {"code": "busy", "message": "come again"}}'
        self.requests: list[tuple[str, str, str | None, bytes]] = []


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script: Scripted

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.headers.get("Authorization")
            script.requests.append((self.command, self.path, key, sent))
            self.send_response(script.statuses[0])
            if len(script.statuses) > 1:
                del script.statuses[0]
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(script.body)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            return

    with answering(Handler) as server:
        script = Scripted(url_of(server))
        yield script


def test_a_request_is_sent_as_it_is_with_the_key(scripted: Scripted) -> None:
    url = f"{scripted.url}/below/v1/"
    answer = RemoteServer(url, "secret").ask("POST", "/v1/./a%2Fb;x", {"a": 1})
    assert scripted.requests == [
        ("POST", "/below/v1/./a%2Fb;x", "Bearer secret", b'{"a": 1}'),
    ]
    assert (answer.status, answer.code, answer.reason) == (200, "busy", "come again")


def test_without_a_key_or_a_body_none_is_sent(scripted: Scripted) -> None:
    RemoteServer(scripted.url).ask("GET", "/metrics")
    assert scripted.requests == [("GET", "/metrics", None, b"")]


def test_a_limit_is_waited_for(scripted: Scripted) -> None:
    server = RemoteServer(scripted.url)
    scripted.statuses = [429, 503, 200]
    assert server.ask_patiently("POST", "/", {}).status == 200
    assert len(scripted.requests) == 3
    scripted.statuses = [503]
    assert server.ask_patiently("POST", "/", {}).status == 503
    assert len(scripted.requests) == 3 + 8


def test_an_error_is_asked_once(scripted: Scripted) -> None:
    scripted.statuses = [500]
    server = RemoteServer(scripted.url)
    assert server.ask_patiently("POST", "/", {}).status == 500
    assert len(scripted.requests) == 1


def test_secrets_are_in_no_name_of_it() -> None:
    server = RemoteServer("https://user:password@host:1/x/v1", "secret")
    assert (server.place, server.base_url) == ("host:1", "https://host:1/x")
    assert "secret" not in repr(server) and "password" not in repr(server)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_a_url_that_is_none_is_refused_by_the_options_name(url: str) -> None:
    with pytest.raises(ConfigError, match="got --there '"):
        RemoteServer(url, option="--there")


def test_no_server_is_an_error_with_its_cure() -> None:
    with answering(BaseHTTPRequestHandler) as gone:
        url = url_of(gone)
    with pytest.raises(RemoteServerError, match=r"does not answer \(.*\); check --url"):
        RemoteServer(url).ask("GET", "/")
    with pytest.raises(RemoteServerError, match="does not answer"):
        next(RemoteServer(url).stream("/", {}))


def test_the_events_of_a_stream_end_with_done(scripted: Scripted) -> None:
    scripted.body = b'data: {"a": 1}\n\n: ping\n\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {}\n\n'
    assert list(RemoteServer(scripted.url).stream("/", {})) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("end", "message"),
    [(b"", "the answer broke off"), (b"data: {", r"does not answer \(JSONDecodeError\)")],
)
def test_a_stream_that_breaks_off_is_an_error(end: bytes, message: str, scripted: Scripted) -> None:
    scripted.body = b'data: {"a": 1}\n\n' + end
    stream = RemoteServer(scripted.url).stream("/", {})
    assert next(stream) == {"a": 1}
    with pytest.raises(RemoteServerError, match=message):
        next(stream)


def test_a_stream_that_is_refused_says_why(scripted: Scripted) -> None:
    scripted.statuses = [429]
    with pytest.raises(RefusedError, match=r"got HTTP 429 from .*: come again") as refused:
        next(RemoteServer(scripted.url).stream("/", {}))
    assert refused.value.answer.code == "busy"
