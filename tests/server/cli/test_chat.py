"""`chat` through a real server: coloured in a terminal, plain elsewhere, and no trip is kept."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import httpx
import pytest
from typer.testing import CliRunner, Result

from circuit_breakers.api.connection import http_server
from circuit_breakers.cli import app
from circuit_breakers.cli.chat import _without_controls

from ...local_server import answering, url_of
from ..api.conftest import Server, free_port, server_environment, user
from ..api.governed_app import governed_app, policy_file

BENIGN = "Tell me the capital of Italy in one sentence."
PROMPT_TRIPS = "Do you like the zebra?"
COMPLETION_TRIPS = "Tell me the capital of France in one sentence."
PARTIAL = "The capital of France is"
OPTIONS = ("--temperature", "0", "--max-tokens", "16")
CODES = {"2": "31", "4": "33", "8": "32"}
"""ANSI's red, yellow and green, by how far below its threshold a score may be."""


def chat(url: str, *arguments: str, **changes: Any) -> Result:
    return CliRunner().invoke(app, ["chat", "--url", url, *OPTIONS, *arguments], **changes)


class InTerminal(NamedTuple):
    exit_code: int
    screen: str

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[\d;]*m", "", self.screen)


def chat_in_terminal(url: str, *arguments: str, keys: str = "", **variables: str) -> InTerminal:
    """`chat` as somebody sees it who types `keys`; both of its outputs are the terminal."""
    ours, theirs = pty.openpty()
    given = {"TERM": "xterm-256color", "COLUMNS": "200"} | variables
    environment = {k: v for k, v in server_environment().items() if k not in ("NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "circuit_breakers.cli", "chat", "--url", url, *OPTIONS, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | given,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, keys.encode())
    seen = b""
    # At the end of the other side Linux gives an error.
    with suppress(OSError):
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    return InTerminal(process.wait(60), seen.decode().replace("\r\n", "\n"))


def key_of(server: Server) -> str:
    return server.admin["Authorization"].removeprefix("Bearer ")


def asked(server: Server, text: str) -> Any:
    body = {"messages": user(text), "temperature": 0, "max_tokens": 16}
    answer = server.http.post(
        "/v1/chat/completions",
        json=body | {"guard": {"token_scores": True}},
        headers=server.admin,
    )
    return answer.json()["choices"][0]


def test_an_answer_goes_to_standard_output_and_its_score_to_the_other(server: Server) -> None:
    done = chat(server.url, BENIGN)
    choice = asked(server, BENIGN)
    assert done.exit_code == 0, done.output
    assert done.stdout == choice["message"]["content"] + "\n"
    guard = choice["guard"]
    assert done.stderr == f"score {guard['score']:.3f}, threshold 0.000 ({guard['probe']})\n"


@pytest.mark.parametrize(
    ("text", "answer", "where"),
    [(PROMPT_TRIPS, "", "prompt"), (COMPLETION_TRIPS, f"{PARTIAL}\n", "completion")],
)
def test_a_trip_has_an_exit_code_of_its_own(
    server: Server, text: str, answer: str, where: str
) -> None:
    done = chat(server.url, text)
    assert (done.exit_code, done.stdout) == (3, answer)
    assert f"tripped in the {where} at token " in done.stderr
    assert "threshold 0.000" in done.stderr
    assert "conversation" not in done.stderr


def test_tokens_have_the_colours_of_their_scores(server: Server) -> None:
    # Elephants are somewhat close to the zebra.
    question = "Name a large animal that lives in Africa."
    done = chat_in_terminal(server.url, question, "--api-key", key_of(server))
    assert done.exit_code == 0, done.screen
    expected, used = "", set()
    for item in asked(server, question)["token_scores"]:
        if item["phase"] == "prompt" or not item["token"]:
            continue
        below = item["threshold"] - item["score"]
        code = next((CODES[b] for b in ("2", "4", "8") if below <= float(b)), None)
        used.add(code)
        expected += f"\x1b[{code}m{item['token']}\x1b[0m" if code else item["token"]
    assert expected in done.screen
    assert used != {None}, "the test would see no colour"
    assert "score of a token: at its threshold or above, up to 2 below" in done.text


def test_a_trip_in_a_terminal_names_the_word(server: Server) -> None:
    done = chat_in_terminal(server.url, PROMPT_TRIPS, CIRCUIT_BREAKERS_API_KEY=key_of(server))
    assert done.exit_code == 3
    assert re.search(r"tripped in the prompt at token \d+ ' zebra': score", done.text)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_none_are_wanted(server: Server, variables: dict[str, str]) -> None:
    done = chat_in_terminal(server.url, BENIGN, "--api-key", key_of(server), **variables)
    assert done.exit_code == 0
    assert "\x1b" not in done.screen
    assert asked(server, BENIGN)["message"]["content"] in done.screen
    assert "score of a token" not in done.screen


def test_without_an_admin_key_there_is_a_note_and_plain_text(server: Server) -> None:
    done = chat_in_terminal(server.url, BENIGN)
    assert done.exit_code == 0
    assert done.text.count("no colours: the server gives the scores of tokens to an admin") == 1
    assert asked(server, BENIGN)["message"]["content"] + "\n" in done.screen


def test_a_conversation_in_a_terminal(server: Server) -> None:
    keys = f"{BENIGN}\n{PROMPT_TRIPS}\n/what\n/quit\n"
    done = chat_in_terminal(server.url, "--api-key", key_of(server), keys=keys)
    assert done.exit_code == 0, "a conversation may have trips"
    assert "/reset forgets the conversation, /quit ends it" in done.text
    assert asked(server, BENIGN)["message"]["content"] in done.text
    assert "tripped in the prompt" in done.text
    assert "got /what, expected a message, /reset or /quit" in done.text


@pytest.fixture
def recorder(server: Server) -> Iterator[tuple[str, list[Any]]]:
    """The URL of a proxy in front of the server, and the conversations that went through it."""
    conversations: list[Any] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(server.http.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            conversations.append([(m["role"], m["content"]) for m in body["messages"]])
            self._answer(server.http.post(self.path, json=body))

        def _answer(self, answer: httpx.Response) -> None:
            self.send_response(answer.status_code)
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with answering(Recorder) as proxy:
        yield f"{url_of(proxy)}/v1", conversations


def test_turns_stay_unless_they_trip(recorder: tuple[str, list[Any]]) -> None:
    url, conversations = recorder
    lines = [BENIGN, PROMPT_TRIPS, COMPLETION_TRIPS, "", "Thanks.", "/reset", "Hello."]
    done = chat(url, "--system", "Be brief.", input="\n".join(lines))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("this turn is left out of the conversation") == 2
    first, second, third, fourth, last = conversations
    system = ("system", "Be brief.")
    assert first == [system, ("user", BENIGN)]
    kept = second[:3]
    assert kept[:2] == first and kept[2][0] == "assistant" and kept[2][1]
    assert second == [*kept, ("user", PROMPT_TRIPS)]
    assert third == [*kept, ("user", COMPLETION_TRIPS)]
    assert fourth == [*kept, ("user", "Thanks.")]
    assert last == [system, ("user", "Hello.")]


def test_a_conversation_outlives_a_refused_turn(server: Server) -> None:
    # MAX_MODEL_LEN is 512 tokens.
    done = chat(server.url, input=f"{'word ' * 2000}\n{BENIGN}\n")
    assert done.exit_code == 0
    assert "got HTTP 400" in done.stderr and "left out of the conversation" in done.stderr
    assert asked(server, BENIGN)["message"]["content"] in done.stdout
    assert chat(server.url, "word " * 2000).exit_code == 1


def test_no_server_is_an_error_with_its_cure() -> None:
    done = chat(f"http://127.0.0.1:{free_port()}", BENIGN)
    assert done.exit_code == 1
    assert "does not answer (ConnectionRefusedError); check --url" in done.stderr


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[str]:
    """The URL of a server with keys whose engine is not there yet."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = http_server(governed_app(policy_file(tmp_path)), timeout_s=30)
    thread = Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("none", "the server does not know; send a valid one; set CIRCUIT_BREAKERS_API_KEY"),
        ("ops", "got HTTP 503"),
    ],
)
def test_a_server_that_refuses_says_why(starting: str, key: str, message: str) -> None:
    done = chat(starting, BENIGN, env={"CIRCUIT_BREAKERS_API_KEY": key})
    assert done.exit_code == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "localhost:8000"), "expected one such as"),
        (("--max-tokens", "0"), "--max-tokens"),
    ],
)
def test_wrong_usage_is_named(arguments: tuple[str, ...], message: str) -> None:
    done = chat("http://127.0.0.1:1", "hi", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_no_answer_steers_the_terminal() -> None:
    assert _without_controls("a\x1b]0;title\x07\x9b1m\n\tß日🦓") == "a�]0;title��1m\n\tß日🦓"
