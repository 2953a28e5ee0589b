"""Rewriting of whole responses and of streams, on events as vLLM writes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from circuit_breakers.api.responses import (
    DONE,
    StreamShape,
    add_guard,
    event_error,
    guard_stream,
    is_error,
)
from circuit_breakers.guard.decision import GuardReport

from .guard_reports import PASSED, TRIPPED, Reports, report

CHAT = StreamShape(id="chatcmpl-1", object="chat.completion.chunk", model="m", num_choices=1)


def chunk(index: int, content: str = "", finish: str | None = None) -> str:
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": index,
                "delta": {"content": content},
                "logprobs": None,
                "finish_reason": finish,
            }
        ],
    }
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


USAGE = 'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":3}}\n\n'


def rewrite(events: Sequence[str], reports: Reports, shape: StreamShape = CHAT) -> list[str]:
    async def source() -> AsyncIterator[str]:
        for event in events:
            yield event

    async def collect() -> list[str]:
        return [event async for event in guard_stream(source(), reports, shape)]

    return asyncio.run(collect())


def parse(event: str) -> Any:
    return json.loads(event.removeprefix("data: "))


def test_only_the_last_chunk_of_a_choice_is_touched() -> None:
    tricky = chunk(0, 'she said "finish_reason":"stop" and "choices":[] and data: {"error"')
    events = [chunk(0, "a"), tricky, chunk(0, "b", "stop"), USAGE, DONE]
    out = rewrite(events, Reports(PASSED))
    assert [out[0], out[1], out[3], out[4]] == [events[0], events[1], USAGE, DONE]
    last = parse(out[2])
    assert last.pop("guard") == PASSED.to_json()
    assert last["choices"][0].pop("guard") == PASSED.to_json()
    assert last == parse(events[2])


def test_a_choice_without_a_last_chunk_gets_one_before_usage_and_done() -> None:
    for tail in ([USAGE, DONE], [DONE]):
        out = rewrite([chunk(0), *tail], Reports(TRIPPED))
        assert out[0] == chunk(0)
        assert out[2:] == tail
        last = parse(out[1])
        assert last["id"] == "chatcmpl-1"
        assert last["choices"][0]["finish_reason"] == "content_filter"
        assert last["choices"][0]["delta"] == {}
        assert last["choices"][0]["guard"] == TRIPPED.to_json()


def test_an_empty_answer_that_did_not_trip_ends_as_the_engine_said() -> None:
    out = rewrite([chunk(0), DONE], Reports(PASSED))
    assert parse(out[1])["choices"][0]["finish_reason"] == "length"


def test_each_of_several_choices_ends_once_with_its_own_report() -> None:
    shape = StreamShape(id="cmpl-1", object="text_completion", model="m", num_choices=3)
    events = [chunk(2, "x", "length"), chunk(1, "y"), DONE]
    out = rewrite(events, Reports(TRIPPED, PASSED, PASSED), shape)
    ends = [parse(e)["choices"][0] for e in out if '"finish_reason":"' in e]
    assert [(e["index"], e["finish_reason"]) for e in ends] == [
        (2, "length"),
        (0, "content_filter"),
        (1, "length"),
    ]
    assert ends[1]["text"] == ""
    assert [e["guard"]["tripped"] for e in ends] == [False, True, False]


def test_content_filter_wins_over_tool_calls() -> None:
    stream = rewrite([chunk(0, "", "tool_calls"), DONE], Reports(TRIPPED))
    assert parse(stream[0])["choices"][0]["finish_reason"] == "content_filter"
    body = {"choices": [{"index": 0, "finish_reason": "tool_calls"}]}
    assert add_guard(body, Reports(TRIPPED))["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (report(tripped=True, score=2.0, mode="observe"), "stop"),
        # An unscored token is a fault, which stops a request in observe mode too.
        (report(tripped=True, score=None, mode="observe", num_unscored=1), "content_filter"),
    ],
)
def test_observe_mode_keeps_the_finish_reason(seen: GuardReport, expected: str) -> None:
    body = add_guard({"choices": [{"index": 0, "finish_reason": "stop"}]}, Reports(seen))
    assert body["choices"][0]["finish_reason"] == expected
    assert body["guard"]["tripped"]


def test_an_error_ends_the_stream_in_openai_shape_without_last_chunks() -> None:
    broken = 'data: {"error":{"message":"boom","type":"x","param":null,"code":500}}\n\n'
    out = rewrite([chunk(0, "a"), broken, DONE], Reports(PASSED))
    assert out[0] == chunk(0, "a")
    assert out[2:] == [DONE]
    assert is_error(out[1])
    assert parse(out[1])["error"] == {
        "message": "boom",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_event_error_reads_vllms_errors_only() -> None:
    assert event_error(chunk(0, 'data: {"error"')) is None
    event = (
        'data: {"error": {"message": "This model\'s maximum context length is 8 tokens. '
        '(parameter=input_tokens, value=9)", "type": "x", "param": "input_tokens", "code": 400}}'
        "\n\n"
    )
    error = event_error(event)
    assert error is not None
    assert (error.status, error.code, error.param) == (
        400,
        "context_length_exceeded",
        "input_tokens",
    )
    assert str(error) == "This model's maximum context length is 8 tokens."


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([PASSED, TRIPPED], TRIPPED),
        ([report(score=-9.0), report(score=-2.0), report(score=None)], report(score=-2.0)),
        ([report(score=None)], report(score=None)),
    ],
)
def test_the_response_carries_the_first_trip_else_the_closest(
    reports: list[GuardReport], expected: GuardReport
) -> None:
    choices = [{"index": i, "finish_reason": "stop"} for i in range(len(reports))]
    body = add_guard({"choices": choices, "kv_transfer_params": {"x": 1}}, Reports(*reports))
    assert body["guard"] == expected.to_json()
    assert "kv_transfer_params" not in body
