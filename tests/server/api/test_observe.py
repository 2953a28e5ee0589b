"""Observe mode reports what it would have stopped; an engine that dies takes readiness along."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from .breaker_for_words import LOOSE_FPR, LOOSE_THRESHOLD
from .conftest import LORA, MODEL, Server


def ask(server: Server, text: str, stream: bool = False) -> Any:
    messages: list[Any] = [{"role": "user", "content": text}]
    return server.openai.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=16, stream=stream
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_trip_is_reported_and_stops_nothing(observing_server: Server, stream: bool) -> None:
    answer = ask(observing_server, "Tell me the capital of France in one sentence.", stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    parts = [c.delta.content if stream else c.message.content for c in choices]
    assert "".join(part or "" for part in parts) == "The capital of France is Paris."
    assert choices[-1].finish_reason == "stop"
    guard = choices[-1].model_extra["guard"]
    assert (guard["mode"], guard["tripped"], guard["phase"]) == ("observe", True, "completion")


def test_the_promise_that_was_asked_for_is_in_force(observing_server: Server) -> None:
    breaker = observing_server.http.get("/v1/breaker").json()
    point = breaker["operating_point"]
    assert (point["target_fpr"], point["num_trips"]) == (LOOSE_FPR, 8)
    assert [p["threshold_logit"] for p in breaker["probes"]] == [LOOSE_THRESHOLD] * 2
    guard = ask(observing_server, "Do you like the zebra?").model_extra["guard"]
    assert guard["threshold"] == LOOSE_THRESHOLD


def test_a_tripped_prompt_is_answered(observing_server: Server) -> None:
    before = observing_server.metrics()
    answer = ask(observing_server, "Do you like the zebra?")
    guard = answer.model_extra["guard"]
    assert (guard["tripped"], guard["phase"], guard["probe"]) == (True, "prompt", "zebra")
    assert answer.choices[0].message.content
    after = observing_server.metrics()
    tripped = (
        f'circuit_breakers_trips_total{{action="observed",model="{MODEL}",phase="prompt",'
        'policy="default"}'
    )
    ok = f'circuit_breakers_requests_total{{model="{MODEL}",outcome="ok",policy="default"}}'
    assert (after[tripped] - before[tripped], after[ok] - before[ok]) == (1, 1)
    assert after["circuit_breakers_leaked_tokens_total"] == 0


@pytest.mark.parametrize("phase", ["input", "output"])
def test_a_request_may_have_a_phase_blocked(observing_server: Server, phase: str) -> None:
    texts = {
        "input": "Do you like the zebra?",
        "output": "Tell me the capital of France in one sentence.",
    }
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": texts[phase]}],
        "temperature": 0,
        "max_tokens": 16,
    }

    def post(mode: str) -> Any:
        moderation = {"model": breaker, "policy": {phase: {"mode": mode}}}
        asked = body | {"moderation": moderation}
        return observing_server.http.post("/v1/chat/completions", json=asked)

    breaker = observing_server.http.get("/v1/breaker").json()["name"]
    scored = post("score")
    assert scored.json()["choices"][0]["finish_reason"] != "content_filter"
    assert scored.json()["moderation"][phase]["results"][0]["flagged"]
    blocked = post("block")
    if phase == "input":
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (400, "content_filter")
    else:
        assert blocked.json()["choices"][0]["finish_reason"] == "content_filter"
        assert "Paris" not in blocked.text


def test_a_listed_lora_runs_on_top_of_the_breaker_and_is_guarded(
    observing_server: Server,
) -> None:
    models = observing_server.http.get("/v1/models").json()["data"]
    assert [(m["id"], m.get("parent")) for m in models] == [(MODEL, None), (LORA, MODEL)]
    messages: list[Any] = [{"role": "user", "content": "Do you like the zebra?"}]
    plain, styled = (
        observing_server.openai.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=16
        )
        for name in (MODEL, LORA)
    )
    assert styled.model == LORA
    assert styled.choices[0].message.content != plain.choices[0].message.content
    assert styled.choices[0].model_extra["guard"]["score"] is not None
    body = {"model": "another", "messages": messages}
    assert observing_server.http.post("/v1/chat/completions", json=body).status_code == 404


def test_a_dead_engine_breaks_streams_off_and_ends_the_server(observing_server: Server) -> None:
    """Last in its module. Whatever runs a server restarts one that has ended."""
    http = observing_server.http
    story = {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=story | {"max_tokens": 400}) as running:
        lines = (line for line in running.iter_lines() if line)
        next(lines)
        for child in observing_server.children():
            os.kill(child.pid, signal.SIGKILL)
        *_, error, done = lines
    # Not an answer that looks whole, and the end of a stream as vLLM writes it.
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
    assert done == "data: [DONE]"
    assert observing_server.process.wait(60) == 1
    assert "error: the engine died" in observing_server.err.read_text()
