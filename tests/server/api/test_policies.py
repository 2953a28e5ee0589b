"""Policies on a live engine: chosen by a request, tightened by it, replaced under it."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from .conftest import MODEL, Server, user


def ask(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": user("Say hello."), "temperature": 0, "max_tokens": 4}
    return server.http.post("/v1/chat/completions", json=body | fields, headers=headers or {})


def test_a_request_is_judged_by_the_policy_that_it_chose(server: Server) -> None:
    plain = ask(server).json()["choices"][0]["guard"]
    assert (plain["policy"], plain["tripped"], plain["threshold"]) == ("default", False, 0.0)
    refused = ask(server, {"X-Breaker-Policy": "nothing"})
    assert refused.status_code == 400
    guard = refused.json()["error"]["guard"]
    # Any score is above its threshold, so the first token that is judged trips.
    assert (guard["policy"], guard["token_index"], guard["phase"]) == ("nothing", 1, "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_the_field_tightens(server: Server, stream: bool) -> None:
    refused = ask(server, stream=stream, guard={"threshold": -1000})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["guard"]["threshold"]) == ("content_filter", -1000.0)
    allowed = ask(server, guard={"target_fpr": 0.05, "mode": "enforce"}).json()
    # The threshold of the other promise that the breaker makes.
    assert allowed["choices"][0]["guard"]["threshold"] == -0.25


@pytest.mark.parametrize(
    ("headers", "guard", "message"),
    [
        ({}, {"mode": "observe"}, "mode observe would stop nothing"),
        ({}, {"threshold": 0.1}, "threshold 0.1 of probe paris is above yours, 0"),
        ({}, {"policy": "watching"}, "mode observe would stop nothing"),
        ({"X-Breaker-Policy": "watching"}, None, "mode observe would stop nothing"),
        ({"X-Breaker-Policy": "nothing"}, {"policy": "default"}, "is above yours"),
        ({"X-Breaker-Policy": "late"}, None, "phase prompt would not be judged"),
        ({}, {"threshold": 1e7}, "guard.threshold"),
        ({}, "strict", "expected an object"),
    ],
)
def test_what_would_loosen_is_refused(
    server: Server, headers: dict[str, str], guard: Any, message: str
) -> None:
    body = {"model": MODEL, "messages": user("Say hello."), "guard": guard}
    answer = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "policy_not_allowed"
    assert message in error["message"]


def test_streams_of_several_policies_run_side_by_side(server: Server) -> None:
    """Each gets its own verdict, whatever runs with it in the same step."""
    from concurrent.futures import ThreadPoolExecutor

    policies = ["default", "nothing", "refusing", "failing"] * 3
    with ThreadPoolExecutor(len(policies)) as pool:
        answers = list(pool.map(lambda p: ask(server, {"X-Breaker-Policy": p}), policies))
    for policy, answer in zip(policies, answers, strict=True):
        assert answer.status_code == (400 if policy == "nothing" else 200)


def test_a_file_is_replaced_by_a_signal_and_a_bad_one_is_not(server: Server) -> None:
    def wait_for(done: Any) -> None:
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline, server.err.read_text()[-2000:]
            time.sleep(0.05)

    def status() -> int:
        code: int = ask(server, {"X-Breaker-Policy": "added"}).status_code
        return code

    original = server.policies.read_text()
    assert status() == 400
    try:
        server.policies.write_text(original + "[policies.added]\n")
        wait_for(lambda: status() == 200)
        server.policies.write_text(original + "[policies.added]\nmodes = 1\n")
        wait_for(lambda: "[policies.added] modes: got an unknown field" in server.err.read_text())
        assert status() == 200, "the old one stays in force"
    finally:
        server.policies.write_text(original)
        wait_for(lambda: status() == 400)
