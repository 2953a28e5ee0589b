"""What is counted of completions, and of clients that go away in the middle of one."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import pytest

from .capitals import BEFORE_PARIS, FRANCE, ITALY, chat, complete
from .conftest import MODEL, Server, user


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_memory(server: Server, stream: bool) -> None:
    labels = f'{{engine="0",model_name="{MODEL}"}}'
    running, memory = f"vllm:num_requests_running{labels}", f"vllm:kv_cache_usage_perc{labels}"
    aborted = (
        f'circuit_breakers_requests_total{{model="{MODEL}",outcome="aborted",policy="default"}}'
    )
    before = server.metrics()[aborted]
    body = {
        "model": MODEL,
        "messages": user("Write a very long story about a dog."),
        "max_tokens": 450,
        "ignore_eos": True,
        "n": 2,
        "stream": stream,
    }

    def leave_in_the_middle() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if not stream:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body, timeout=1.0)
                return
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                while server.metrics()[running] < 2:
                    next(lines)

    leave_in_the_middle()
    wait_for(lambda: server.metrics()[running] == 0, "the request is still running")
    assert server.metrics()[memory] == 0
    wait_for(lambda: server.metrics()[aborted] == before + 1, "the abort was not counted")


def test_a_client_that_goes_away_in_its_own_body_is_an_abort(server: Server) -> None:
    aborted = (
        f'circuit_breakers_requests_total{{model="{MODEL}",outcome="aborted",policy="default"}}'
    )
    before = server.metrics()[aborted]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"messages":'
        )
        time.sleep(0.2)
    wait_for(lambda: server.metrics()[aborted] == before + 1, "the abort was not counted")


def test_metrics_are_what_the_client_saw(server: Server) -> None:
    before = server.metrics()
    for stream in (False, True):
        for text in (ITALY, FRANCE):
            answer = chat(server, text, stream=stream)
            list(answer)
    complete(server, [BEFORE_PARIS, BEFORE_PARIS, "The capital of Italy is"])
    for bad in ({"messages": user("a zebra")}, {"messages": []}, {"nope": 1}):
        server.http.post("/v1/chat/completions", json={"model": MODEL} | bad)
    after = server.metrics()

    def grew(name: str, **labels: str) -> float:
        listed = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
        key = f"circuit_breakers_{name}" + (f"{{{listed}}}" if listed else "")
        return after[key] - before[key]

    requests = {
        outcome: grew("requests_total", model=MODEL, policy="default", outcome=outcome)
        for outcome in (
            "ok",
            "tripped_completion",
            "tripped_prompt",
            "rejected",
            "aborted",
            "error",
        )
    }
    assert requests == {
        "ok": 2,
        "tripped_completion": 3,
        "tripped_prompt": 1,
        "rejected": 2,
        "aborted": 0,
        "error": 0,
    }

    def trips(phase: str) -> float:
        return grew("trips_total", model=MODEL, policy="default", phase=phase, action="stopped")

    assert (trips("completion"), trips("prompt")) == (4, 1)  # two of them in one request
    assert grew("trip_token_index_count") == 5
    assert grew("score_count", phase="prompt") == 6
    assert grew("score_count", phase="completion") == 5
    assert grew("delivered_ttft_seconds_count") == 5
    # One scored token was withheld for each completion trip.
    assert (grew("held_tokens_count"), grew("held_tokens_sum")) == (5, 4)


def test_nothing_leaked_and_nothing_stayed_unscored(server: Server) -> None:
    metrics = server.metrics()
    assert metrics["circuit_breakers_leaked_tokens_total"] == 0
    assert metrics["circuit_breakers_unscored_tokens_total"] == 0
