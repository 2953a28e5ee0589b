"""What a guarded server with API keys is made of, and a server without a guard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from ..local_server import answering, url_of
from ..server.api.conftest import MODEL, POLICIES
from ..server.api.governed_app import SECRET, key_table


class Guarded(NamedTuple):
    """A server and keys for it."""

    url: str
    """With /v1."""
    model: str = MODEL
    key: str = "user"
    admin_key: str = "ops"
    watched_key: str = "watched"
    """Its policy observes."""
    audit_db: Path = Path()

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
_PATH = "/v1/chat/completions"
_RESPONSE = UNGUARDED["/v1/responses"]
KEPT = {
    "/v1/responses/kept": _RESPONSE,
    "/v1/responses/kept/cancel": _RESPONSE,
    "/v1/responses/compact": _RESPONSE,
    f"{_PATH}/kept": UNGUARDED[_PATH],
}
"""What it made before."""
_LIST: dict[str, Any] = {"object": "list", "data": [], "model": "m"}
_JSON = "application/json"
LABELS = {"labelled-stream": "text/event-stream; charset=utf-8", "labelled-text": "text/plain"}
"""Models whose JSON says that it is something else."""
_CHUNK = _CHAT | {
    "object": "chat.completion.chunk",
    "choices": [_SAYS | {"delta": {"content": "hi"}}],
}


class _WithoutGuard(BaseHTTPRequestHandler):
    """Answers as a server does that knows nothing of a breaker: 404 on /v1/breaker."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        kept = {"/v1/models": _LIST, "/elsewhere": UNGUARDED[_PATH]} | KEPT
        if self.path in kept:
            self._answer(200, kept[self.path])
        else:
            self._answer(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        path = urlsplit(self.path).path
        if path.startswith("/v1/moved/"):
            self._send(int(path.split("/")[3]), b"", _JSON, Location="/elsewhere")
        elif path == "/elsewhere":
            self._answer(200, UNGUARDED[_PATH])
        elif path not in UNGUARDED:
            self._answer(200, KEPT.get(path, _LIST))
        elif not asked.get("stream"):
            if asked["model"] == "says-text":
                self._send(200, b"hi", "text/plain")
            else:
                self._answer(200, UNGUARDED[path], LABELS.get(asked["model"], _JSON))
        else:
            ending = "data: [DONE]\n\n" if asked["model"] == "says-done" else ""
            body = f"data: {json.dumps(_CHUNK)}\n\n" * (not ending) + ending
            self._send(200, body.encode(), "text/event-stream")

    def _answer(self, status: int, body: Any, kind: str = _JSON) -> None:
        self._send(status, json.dumps(body).encode(), kind)

    def _send(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name, value)
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
    with answering(_WithoutGuard) as server:
        server.asked = []  # type: ignore[attr-defined]
        yield Unguarded(f"{url_of(server)}/v1", server.asked)  # type: ignore[attr-defined]
