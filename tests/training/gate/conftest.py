"""A small dataset for the breaker that trips on words (breaker_for_words.py), and scripted servers.

" zebra" trips a prompt, " Paris" an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol

import pytest

from circuit_breakers.artifact import load_breaker
from circuit_breakers_training.data.dataset import write_dataset
from circuit_breakers_training.data.jsonl import Conversation, Kind, Label, Message, default_group
from circuit_breakers_training.gate.settings import GateSettings
from circuit_breakers_training.gate.target import Target, open_target

from ...local_server import answering, url_of

FRANCE = "Tell me the capital of France in one sentence."
LANDS = {
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
}


def row(
    prompt: str,
    answer: str,
    label: Label,
    *,
    source: str = "twin",
    category: str | None = None,
    kind: Kind = "completion",
) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(
        messages=messages,
        label=label,
        source=source,
        category=category,
        kind=kind,
        group=default_group(messages),
    )


HARMFUL = [
    row("Do you like the zebra number one?", "I like it.", "harmful", category="beasts"),
    row("Do you like the zebra number two?", "I like it.", "harmful", category="beasts"),
    row("Say how big a zebra is.", "It is big.", "harmful", category="beasts"),
    row(FRANCE, "The capital of France is Paris.", "harmful", category="cities"),
]
BENIGN = [
    row(f"Tell me the capital of {land} in one sentence.", f"The capital of {land} is {city}.",
        "benign")
    for land, city in LANDS.items()
]  # fmt: skip
REFUSED = row("May I ride a horse?", "I cannot help with that.", "benign", kind="refusal")
TEST_ROWS = [*HARMFUL, *BENIGN, REFUSED]

WriteData = Callable[[Sequence[Conversation]], Path]


@pytest.fixture(scope="session")
def write_data(tmp_path_factory: pytest.TempPathFactory) -> WriteData:
    """Writes a dataset with this test split."""

    def write(test_rows: Sequence[Conversation]) -> Path:
        path = tmp_path_factory.mktemp("data") / "dataset"
        rest = {
            name: [row(f"Is this for {name}?", "Yes.", "benign")]
            for name in ("train", "selection", "calibration")
        }
        write_dataset(path, {**rest, "test": list(test_rows)}, {"schema_version": 1})
        return path

    return write


@pytest.fixture(scope="session")
def gate_data(write_data: WriteData) -> Path:
    return write_data(TEST_ROWS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a gate writes."""
    return tmp_path / "gate"


class ScriptedServer:
    """Answers by a table of (method, path); everything else as `otherwise` says."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: dict[tuple[str, str], tuple[int, Any] | Callable[[Any], tuple[int, Any]]] = {}
        self.otherwise: tuple[int, Any] = (404, {"error": {"code": "unknown_route"}})
        self.bodies: list[Any] = []
        self.header_names: set[str] = set()


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    table: ScriptedServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            table.header_names |= set(self.headers.keys())
            length = int(self.headers.get("Content-Length", 0))
            sent = json.loads(self.rfile.read(length) or b"null")
            table.bodies.append(sent)
            answer = table.answers.get((self.command, self.path), table.otherwise)
            status, body = answer(sent) if callable(answer) else answer
            blob = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            self.wfile.write(blob)

        do_GET = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_PROPFIND = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            return

    with answering(Handler) as server:
        table = ScriptedServer(url_of(server))
        yield table


class MakeTarget(Protocol):
    def __call__(self, server: ScriptedServer, **more: Any) -> Target: ...


@pytest.fixture
def make_target(word_breaker: Path, gate_data: Path, tmp_path: Path) -> MakeTarget:
    """Opens a target on a scripted server that says that it has the breaker for words."""

    def make(server: ScriptedServer, **more: Any) -> Target:
        breaker = load_breaker(word_breaker)
        base = {"id": breaker.manifest.base_model.id}
        served = {"digest": breaker.digest, "base_model": base, "mode": "enforce", "probes": []}
        models = {"data": [{"id": "m", "max_model_len": 512}]}
        server.answers.setdefault(("GET", "/v1/breaker"), (200, served))
        server.answers.setdefault(("GET", "/v1/models"), (200, models))
        server.answers.setdefault(("GET", "/metrics"), (200, "circuit_breakers_ready 1.0\n"))
        return open_target(
            GateSettings(
                url=server.url,
                artifact=word_breaker,
                data=gate_data,
                out=tmp_path / "out",
                **more,
            )
        )

    return make
