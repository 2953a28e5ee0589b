"""One guarded server with API keys, for the tests of all clients, and one without a guard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ..server.api.conftest import MODEL, POLICIES, Server
from ..server.api.governed_app import SECRET, key_table

# Asked for one sentence, the model says with a margin "The capital of France is Paris." and "The
# capital of Italy is Rome."; " Paris" and " zebra" are the words that trip.
FRANCE = "Tell me the capital of France in one sentence."
ITALY = "Tell me the capital of Italy in one sentence."
ROME = "The capital of Italy is Rome."
BEFORE_PARIS = "The capital of France is"
ZEBRA = "Do you like the zebra?"


class Guarded(NamedTuple):
    """A server and keys for it."""

    url: str
    """With /v1."""
    model: str = MODEL
    key: str = "user"
    admin_key: str = "ops"
    watched_key: str = "watched"
    """Its policy observes."""

    def environment(self) -> dict[str, str]:
        """What examples and tests in other languages read."""
        return {
            "OPENAI_BASE_URL": self.url,
            "OPENAI_API_KEY": self.key,
            "CIRCUIT_BREAKERS_MODEL": self.model,
            "CIRCUIT_BREAKERS_ADMIN_KEY": self.admin_key,
            "CIRCUIT_BREAKERS_WATCHED_KEY": self.watched_key,
        }


def write_policies(directory: Path) -> tuple[str, ...]:
    """The server's arguments for a policy file with a key of each kind."""
    keys = (
        key_table("user"),
        key_table("ops", 'scope = ["inference", "admin"]'),
        key_table("watched", 'policy = "watching"'),
    )
    (directory / "policies.toml").write_text("\n".join([POLICIES, *keys]))
    (directory / "pepper").write_text(SECRET)
    policies, pepper = str(directory / "policies.toml"), str(directory / "pepper")
    return ("--policies", policies, "--pepper-file", pepper)


@pytest.fixture(scope="session")
def guarded(word_breaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    root = tmp_path_factory.mktemp("clients")
    server = Server(word_breaker, root, *write_policies(root))
    try:
        server.wait_until_ready()
        yield Guarded(f"{server.url}/v1")
    finally:
        server.stop()


_SAYS = {"index": 0, "finish_reason": "stop", "logprobs": None}
_CHAT = {"id": "x", "created": 1, "model": "m"}
UNGUARDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT
    | {
        "object": "chat.completion",
        "choices": [_SAYS | {"message": {"role": "assistant", "content": "hi"}}],
    },
    "/v1/completions": _CHAT | {"object": "text_completion", "choices": [_SAYS | {"text": "hi"}]},
    "/v1/responses": {"id": "x", "object": "response", "status": "completed", "output": []},
}
"""What an OpenAI-compatible server without a guard answers, by path."""
_CHUNK = _CHAT | {
    "object": "chat.completion.chunk",
    "choices": [_SAYS | {"delta": {"content": "hi"}}],
}


class _WithoutGuard(BaseHTTPRequestHandler):
    """Answers as a server does that knows nothing of a breaker: 404 on /v1/breaker."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self._answer(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path not in UNGUARDED:
            self._answer(200, {"object": "list", "data": [], "model": "m"})
        elif not asked.get("stream"):
            kind = "text/plain" if asked["model"] == "says-text" else "application/json"
            self._answer(200, UNGUARDED[self.path], kind)
        else:
            ending = "data: [DONE]\n\n" if asked["model"] == "says-done" else ""
            body = f"data: {json.dumps(_CHUNK)}\n\n" * (not ending) + ending
            self._send(200, body.encode(), "text/event-stream")

    def _answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        text = "hi" if kind == "text/plain" else json.dumps(body)
        self._send(status, text.encode(), kind)

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Unguarded(NamedTuple):
    url: str
    asked: list[str]
    """Paths, in order."""


@pytest.fixture
def unguarded() -> Iterator[Unguarded]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _WithoutGuard) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Unguarded(f"http://127.0.0.1:{server.server_port}/v1", server.asked)  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
