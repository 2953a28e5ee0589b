"""What a gate is called with, on a real server: a second server, and input that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from circuit_breakers_training.gate.asking import CHAT
from circuit_breakers_training.gate.run import CHECKS

from ...server.api.conftest import Server, free_port
from .conftest import HARMFUL, ScriptedServer
from .gates import MADE_BARS, gate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def unguarded(scripted: ScriptedServer) -> ScriptedServer:
    """A server that has no breaker and answers everything with the same eight tokens."""
    models = {"data": [{"id": "plain", "max_model_len": 512}]}
    scripted.answers[("GET", "/v1/models")] = (200, models)
    scripted.answers[("POST", CHAT)] = (
        200,
        {"choices": [{"message": {"content": "Nothing."}}], "usage": {"completion_tokens": 8}},
    )
    return scripted


def test_an_unguarded_server_is_the_base_and_the_yardstick(
    server: Server, word_breaker: Path, gate_data: Path, out: Path, unguarded: ScriptedServer
) -> None:
    kept = ("live", "overhead")
    options = tuple(part for name in CHECKS if name not in kept for part in ("--skip", name))
    more = ("--api-key", "a-secret-key", "--unguarded-url", unguarded.url)
    bars = f"{MADE_BARS}[overhead.ratio]\nat_least = 1e-6\n"
    found = gate(server.url, word_breaker, gate_data, out, *options, *more, bars=bars)
    assert found.done.exit_code == 0, found.done.output
    ratio = found.row("overhead", "ratio")
    assert (ratio["count"], ratio["low"] <= ratio["value"] <= ratio["high"]) == (8, True)
    assert found.row("live", "base_complied")["count"] == 4
    asked = [body["messages"][-1]["content"] for body in unguarded.bodies if body]
    assert {conversation.prompt for conversation in HARMFUL} <= set(asked)
    # Eight pairs and the one that warms up, of 16 requests; no prompt twice.
    assert len(asked) == len(set(asked)) == 4 + 9 * 16
    assert {body["model"] for body in unguarded.bodies if body} == {"plain"}
    assert "authorization" not in {name.lower() for name in unguarded.header_names}
    assert "a-secret-key" not in (out / "gate.json").read_text() + (out / "gate.html").read_text()


def test_an_unguarded_server_that_fails_proves_nothing(
    server: Server, word_breaker: Path, gate_data: Path, out: Path, unguarded: ScriptedServer
) -> None:
    unguarded.answers[("POST", CHAT)] = (500, {})
    skips = (n for n in CHECKS if n not in ("over-refusal", "overhead"))
    options = tuple(part for name in skips for part in ("--skip", name))
    found = gate(
        server.url, word_breaker, gate_data, out, *options, "--unguarded-url", unguarded.url
    )
    assert found.result["missed"] == ["over-refusal", "overhead"]
    assert "got no answer from --unguarded-url" in found.check("over-refusal")["reason"]
    assert "got HTTP 500" in found.check("overhead")["reason"]


def test_a_guarded_server_is_no_yardstick(
    server: Server, word_breaker: Path, gate_data: Path, out: Path
) -> None:
    found = gate(server.url, word_breaker, gate_data, out, "--unguarded-url", server.url)
    assert found.done.exit_code == 2
    assert "got a guarded server at --unguarded-url" in found.done.stderr


def test_bad_input_is_named_before_anything_is_asked(
    server: Server, word_breaker: Path, gate_data: Path, out: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    without_test = tmp_path / "without"
    without_test.mkdir()
    for name in ("dataset.json", "train.jsonl", "selection.jsonl", "calibration.jsonl"):
        (without_test / name).write_bytes((gate_data / name).read_bytes())
    good: dict[str, Any] = {
        "url": server.url,
        "artifact": word_breaker,
        "data": gate_data,
        "out": out,
    }
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"url": f"http://127.0.0.1:{free_port()}"}, (), "check --url"),
        ({"url": "localhost:8000"}, (), "expected one such as http"),
        ({"artifact": tmp_path / "none"}, (), "expected a breaker directory"),
        ({"data": tmp_path / "none"}, (), "expected a built dataset"),
        ({"data": without_test}, (), "test.jsonl"),
        ({"out": taken}, (), "expected a new directory"),
        ({}, ("--skip", "nothing"), "got --skip 'nothing', expected one of identity"),
        ({}, ("--bars", str(tmp_path / "none.toml")), "check --bars"),
        ({}, ("--limit", "0"), "--limit"),
    ]
    for changed, options, said in cases:
        given = good | changed
        found = gate(given["url"], given["artifact"], given["data"], given["out"], *options)
        assert found.done.exit_code == 2, (said, found.done.output)
        assert said in found.done.stderr
        assert not out.exists()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            401,
            {"error": {"message": "got no API key"}},
            "got no API key; give a key with --api-key",
        ),
        (404, {}, "this one has no guard"),
        (503, {"error": {"message": "the model loads"}}, "check --url, and that /readyz"),
        (200, {"object": "list"}, "got no breaker at /v1/breaker"),
        (200, {"digest": "0", "base_model": {"id": "another"}}, "expected 'smollm2-135m-instruct'"),
    ],
)
def test_a_server_of_another_kind_is_refused(
    word_breaker: Path,
    gate_data: Path,
    out: Path,
    scripted: ScriptedServer,
    status: int,
    body: Any,
    said: str,
) -> None:
    scripted.answers[("GET", "/v1/breaker")] = (status, body)
    found = gate(scripted.url, word_breaker, gate_data, out)
    assert found.done.exit_code == 2
    assert said in found.done.stderr
    assert not out.exists()
