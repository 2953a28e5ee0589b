"""How a response of OpenAI's says what the guard found, on events as vLLM writes them."""

from __future__ import annotations

from typing import Any

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.formats import named_event, parse_event
from circuit_breakers.api.response_format import ResponseFormat

from .guard_reports import PASSED, TRIPPED, FormatRequest, Reports, collect

FORMAT = ResponseFormat()
USAGE = {"input_tokens": 9, "output_tokens": 5, "total_tokens": 14}


def response(status: str = "completed") -> dict[str, Any]:
    item = {"type": "message", "status": "completed", "content": []}
    return {
        "id": "resp_1",
        "status": status,
        "incomplete_details": None,
        "output": [item],
        "usage": dict(USAGE),
        "kv_transfer_params": {"x": 1},
        "input_messages": ["secret"],
    }


def test_a_stopped_response_is_incomplete_by_content_filter() -> None:
    call = FormatRequest()
    body = FORMAT.whole(response(), Reports(TRIPPED), call)
    assert (body["status"], body["incomplete_details"]) == (
        "incomplete",
        {"reason": "content_filter"},
    )
    assert body["output"][-1]["status"] == "incomplete"
    assert body["guard"] == TRIPPED.to_json()
    assert call.final_usage == USAGE
    assert not body.keys() & {"kv_transfer_params", "input_messages"}


def test_a_response_that_passed_stays_as_vllm_says() -> None:
    body = FORMAT.whole(response("incomplete"), Reports(PASSED), FormatRequest())
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] is None
    assert body["output"][-1]["status"] == "completed"
    assert body["guard"] == PASSED.to_json()


def events(last: dict[str, Any]) -> list[str]:
    item = {"type": "function_call", "status": "completed", "arguments": '{"pla'}
    return [
        named_event("response.created", {"type": "response.created", "sequence_number": 0}),
        named_event(
            "response.output_text.delta",
            {"type": "response.output_text.delta", "delta": "event: response.completed\n"},
        ),
        named_event(
            "response.output_item.done", {"type": "response.output_item.done", "item": item}
        ),
        named_event("response.completed", {"type": "response.completed", "response": last}),
    ]


def test_a_stopped_stream_ends_with_an_incomplete_response() -> None:
    given = events(response())
    sent = collect(FORMAT.stream, given, Reports(TRIPPED))
    assert sent[:2] == given[:2]
    assert parse_event(sent[2])["item"]["status"] == "incomplete"
    assert sent[3].startswith("event: response.incomplete\n")
    last = parse_event(sent[3])
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "content_filter"}
    assert [FORMAT.is_end(event) for event in sent] == [False, False, False, True]


def test_a_stream_that_passed_ends_as_complete_or_out_of_tokens() -> None:
    for status in ("completed", "incomplete"):
        given = events(response(status))
        sent = collect(FORMAT.stream, given, Reports(PASSED))
        assert sent[:3] == given[:3]
        assert parse_event(sent[3])["type"] == f"response.{status}"
        assert FORMAT.is_end(sent[3])


def test_an_error_is_an_event_of_the_stream_with_the_next_number() -> None:
    event = FORMAT.error_event(ApiError(500, "boom", code="internal_error"), 7)
    assert FORMAT.is_error(event)
    body = parse_event(event)
    assert (body["type"], body["code"], body["message"]) == ("error", "internal_error", "boom")
    assert body["sequence_number"] == 7
