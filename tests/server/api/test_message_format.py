"""How a message of Anthropic's says what the guard found, on events as vLLM writes them."""

from __future__ import annotations

from typing import Any

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.formats import named_event, parse_event
from circuit_breakers.api.message_format import MessageFormat

from .guard_reports import PASSED, TRIPPED, FormatRequest, Reports, collect

FORMAT = MessageFormat()


def events(stop_reason: str | None) -> list[str]:
    delta = {"type": "text_delta", "text": "event: message_delta\n"}
    return [
        named_event("content_block_delta", {"type": "content_block_delta", "delta": delta}),
        named_event(
            "message_delta",
            {
                "type": "message_delta",
                "delta": {"stop_reason": stop_reason, "stop_sequence": None},
                "usage": {"output_tokens": 5},
            },
        ),
        named_event("message_stop", {"type": "message_stop"}),
    ]


def test_a_stopped_message_is_a_refusal() -> None:
    # vLLM gives none, or says end_turn when the first token tripped.
    for said in ({}, {"stop_reason": "end_turn"}, {"stop_reason": "tool_use"}):
        body: dict[str, Any] = {"content": [], "kv_transfer_params": {"x": 1}, **said}
        body = FORMAT.whole(body, Reports(TRIPPED), FormatRequest())
        assert (body["stop_reason"], body["stop_sequence"]) == ("refusal", None)
        assert body["guard"] == TRIPPED.to_json()
        assert "kv_transfer_params" not in body


def test_a_message_that_passed_stays_as_vllm_says() -> None:
    body = {"content": [], "stop_reason": "stop_sequence", "stop_sequence": "x"}
    body = FORMAT.whole(body, Reports(PASSED), FormatRequest())
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "x")
    assert body["guard"] == PASSED.to_json()


def test_only_the_delta_that_ends_a_stream_is_touched() -> None:
    for seen, said, expected in ((TRIPPED, None, "refusal"), (PASSED, "end_turn", "end_turn")):
        given = events(said)
        sent = collect(FORMAT.stream, given, Reports(seen))
        assert [sent[0], sent[2]] == [given[0], given[2]]
        body = parse_event(sent[1])
        assert body["delta"]["stop_reason"] == expected
        assert body["guard"] == seen.to_json()
        assert [FORMAT.is_end(event) for event in sent] == [False, False, True]


def test_an_error_has_anthropics_shape() -> None:
    event = FORMAT.error_event(ApiError(503, "full", code="unavailable"), 7)
    assert FORMAT.is_error(event)
    body = parse_event(event)
    assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")
    assert body["error"]["message"] == "full"
