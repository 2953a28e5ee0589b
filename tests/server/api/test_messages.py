"""POST /v1/messages: Anthropic's format over plain HTTP, whole, streamed and tripped."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from .capitals import BEFORE_PARIS, FRANCE, ITALY
from .conftest import MODEL, Server, user


def post(server: Server, text: str, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": user(text), "temperature": 0, "max_tokens": 32} | more
    return server.http.post("/v1/messages", json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_has_anthropics_shape_and_its_guard(server: Server) -> None:
    body = post(server, ITALY, system=[{"type": "text", "text": "Be short."}]).json()
    assert (body["type"], body["role"], body["stop_reason"]) == ("message", "assistant", "end_turn")
    assert [block["type"] for block in body["content"]] == ["text"]
    assert body["usage"]["output_tokens"] > 0
    assert body["guard"]["tripped"] is False


def test_a_trip_is_a_refusal(server: Server) -> None:
    body = post(server, FRANCE).json()
    assert body["content"] == [{"type": "text", "text": BEFORE_PARIS}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("refusal", None)
    assert (body["guard"]["phase"], body["guard"]["probe"]) == ("completion", "paris")


@pytest.mark.parametrize(
    ("text", "said", "reason"),
    [(ITALY, "The capital of Italy is Rome.", "end_turn"), (FRANCE, BEFORE_PARIS, "refusal")],
)
def test_a_stream_ends_with_its_stop_reason(
    server: Server, text: str, said: str, reason: str
) -> None:
    sent = events(post(server, text, stream=True))
    assert [sent[0]["type"], sent[-2]["type"], sent[-1]["type"]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    deltas = [event["delta"]["text"] for event in sent if event["type"] == "content_block_delta"]
    assert "".join(deltas) == said
    assert sent[-2]["delta"]["stop_reason"] == reason
    assert sent[-2]["guard"]["tripped"] == (reason == "refusal")


@pytest.mark.parametrize("stream", [False, True])
def test_a_tripped_prompt_is_a_400_in_anthropics_shape(server: Server, stream: bool) -> None:
    response = post(server, "Do you like the zebra?", stream=stream)
    body = response.json()
    assert (response.status_code, body["type"]) == (400, "error")
    assert (body["error"]["type"], body["error"]["code"]) == (
        "invalid_request_error",
        "content_filter",
    )
    assert body["error"]["guard"]["phase"] == "prompt"


@pytest.mark.parametrize(
    ("status", "kind", "fields"),
    [
        (404, "not_found_error", {"model": "claude"}),
        (400, "invalid_request_error", {"nope": 1}),
        (400, "invalid_request_error", {"max_tokens": 0}),
        (400, "invalid_request_error", {"messages": user("dog " * 600)}),
        (400, "invalid_request_error", {"temperature": -1}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_an_error_before_the_first_event(
    server: Server, status: int, kind: str, fields: Any, stream: bool
) -> None:
    response = post(server, "hi", stream=stream, **fields)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)


def test_a_tool_call_that_does_not_fit_the_format_is_no_fault_of_the_clients(
    server: Server,
) -> None:
    # Arguments have to be an object; the grammar lets the model write the text alone.
    schema = {"type": "string", "enum": ["secret"]}
    tool = {"name": "find", "strict": True, "input_schema": schema}
    choice = {"type": "any"}
    response = post(server, "Find it.", tools=[tool], tool_choice=choice, max_tokens=64)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "invalid_tool_call"
    assert "secret" not in response.text


def test_tools_are_called(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["Rome"]}},
        "required": ["place"],
        "additionalProperties": False,
    }
    tool = {"name": "find", "strict": True, "input_schema": schema}
    for stream in (False, True):
        response = post(
            server,
            "Find it.",
            tools=[tool],
            tool_choice={"type": "any"},
            max_tokens=96,
            stream=stream,
        )
        if stream:
            sent = events(response)
            assert sent[-2]["delta"]["stop_reason"] == "tool_use"
            parts = [event["delta"].get("partial_json", "") for event in sent if "delta" in event]
            assert json.loads("".join(parts)) == {"place": "Rome"}
        else:
            (call,) = response.json()["content"]
            assert (call["type"], call["name"], call["input"]) == (
                "tool_use",
                "find",
                {"place": "Rome"},
            )


def test_metrics_count_messages_as_they_were_delivered(server: Server) -> None:
    before = server.metrics()
    for stream in (False, True):
        for text in (ITALY, FRANCE):
            post(server, text, stream=stream)
    after = server.metrics()
    for outcome in ("ok", "tripped_completion"):
        labels = f'model="{MODEL}",outcome="{outcome}",policy="default"'
        name = f"circuit_breakers_requests_total{{{labels}}}"
        assert after[name] - before[name] == 2
    held = "circuit_breakers_held_tokens_count"
    assert after[held] - before[held] == 4
    assert after["circuit_breakers_leaked_tokens_total"] == 0
