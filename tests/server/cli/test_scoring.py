"""`score` through a real server: what trips as a prompt is flagged, and no content is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from circuit_breakers.cli import app

from ...local_server import answering, url_of
from ..api.conftest import Server, free_port

CONVERSATIONS = [
    {"text": "What is the capital of Italy?", "label": "benign"},
    {"messages": [{"role": "user", "content": "Do you like the zebra?"}], "label": "harmful"},
    {
        "messages": [
            {"role": "user", "content": "Name a city."},
            {"role": "assistant", "content": "I would say Paris"},
        ],
        "label": "harmful",
    },
]
"""The canaries of the breaker for words: " zebra" and " Paris" are what it trips on."""


def score(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["score", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(map(json.dumps, CONVERSATIONS)))
    return path


def test_scores_become_json_lines(server: Server, file: Path) -> None:
    done = score(str(file), "--url", server.url)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    # Every other line of the file is blank.
    assert [row["line"] for row in rows] == [1, 3, 5]
    assert [row["flagged"] for row in rows] == [False, True, True]
    for row, probe in zip(rows[1:], ("zebra", "paris"), strict=True):
        # 0.5 is the threshold.
        assert row["scores"][probe] >= 0.5 > min(row["scores"].values())
    assert "label benign: 0 of 1 flagged" in done.stderr
    assert "label harmful: 2 of 2 flagged" in done.stderr
    assert "zebra?" not in done.output and "city" not in done.output


def test_scores_become_a_table(server: Server, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    done = score(str(file), "--url", f"{server.url}/v1", "--out", str(out), "--concurrency", "1")
    assert (done.exit_code, done.stdout) == (0, "")
    with out.open(newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["line", "label", "flagged", "paris", "zebra"]
    assert [row[:3] for row in table[1:]] == [
        ["1", "benign", "0"],
        ["3", "harmful", "1"],
        ["5", "harmful", "1"],
    ]


def test_a_conversation_that_is_refused_leaves_no_file(server: Server, tmp_path: Path) -> None:
    file, out = tmp_path / "chats.jsonl", tmp_path / "scores.csv"
    # MAX_MODEL_LEN is 512 tokens.
    rows = [{"text": "hello"}, {"text": "word " * 2000}]
    file.write_text("\n".join(map(json.dumps, rows)))
    done = score(str(file), "--url", server.url, "--out", str(out))
    assert done.exit_code == 1
    assert "line 2: got HTTP 400" in done.stderr
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[Any]]]:
    """The URL of a proxy that answers for a server that is down, and what it was asked."""
    asked: list[Any] = []

    class BadGateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(502)
            self.end_headers()
            self.wfile.write(b'{"error": "Bad Gateway"}')

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with answering(BadGateway) as server:
        yield url_of(server), asked


def test_another_shape_of_error_is_an_error_too(file: Path, proxy: tuple[str, list[Any]]) -> None:
    done = score(str(file), "--url", proxy[0], "--concurrency", "1")
    assert done.exit_code == 1, done.exception
    assert "line 1: got HTTP 502" in done.stderr
    assert "no reason" in done.stderr


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_line_feeds_end_a_line(
    tmp_path: Path, proxy: tuple[str, list[Any]], separator: str
) -> None:
    # JSON strings may hold all other line ends of Unicode as they are.
    text = f"one{separator}two"
    file = tmp_path / "chats.jsonl"
    row = json.dumps({"text": text}, ensure_ascii=False)
    file.write_bytes(f"\r\n{row}\r\n".encode())
    done = score(str(file), "--url", proxy[0])
    assert "line 2: got HTTP 502" in done.stderr, done.output
    assert [body["input"][0]["content"] for body in proxy[1]] == [text]


def test_no_server_is_an_error_with_its_cure(file: Path) -> None:
    done = score(str(file), "--url", f"http://127.0.0.1:{free_port()}")
    assert done.exit_code == 1
    assert "does not answer (ConnectionRefusedError); check --url" in done.stderr


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", (), "got no conversations"),
        ("{", (), "line 1: not JSON"),
        ("[" * 5000, (), "line 1: not JSON"),
        ('{"text": "a"}\n{"prompt": "b"}', (), "line 2: got neither"),
        ('{"messages": []}', (), "line 1: got neither"),
        ('{"messages": ["a"]}', (), "line 1: got neither"),
        ('{"text": "a"}', ("--out", "scores.txt"), "ends in .csv or .jsonl"),
        ('{"text": "a"}', ("--out", "no/such/dir/a.csv"), "existing directory"),
        ('{"text": "a"}', ("--url", "localhost:8000"), "expected one such as"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, content: str, options: tuple[str, ...], message: str
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(content)
    done = score(str(file), *options)
    assert done.exit_code == 2
    assert message in done.stderr
