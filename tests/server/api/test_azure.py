"""Azure's annotations: only in chunks that exist anyway, unless the client asked for more."""

from __future__ import annotations

import json
from typing import Any

from circuit_breakers.api.azure import AzureAnnotator
from circuit_breakers.api.responses import DONE, StreamShape, add_guard, guard_stream

from .guard_reports import PASSED, TRIPPED, Reports, collect

MARGINS: Any = {"prompt": {"p": -1.0, "q": -2.0}, "completion": {"p": 1.0, "q": -2.0}}
SAFE = {"filtered": False, "detected": False}
CHAT = StreamShape(id="chatcmpl-1", object="chat.completion.chunk", model="m", num_choices=1)


def chunk(content: str, finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    body = {"id": "chatcmpl-1", "object": CHAT.object, "choices": [choice]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def rewrite(*, separate: bool) -> list[Any]:
    def stream(events: Any, reports: Reports, _: Any) -> Any:
        annotator = AzureAnnotator(num_choices=1, choices_per_prompt=1, separate=separate)
        return guard_stream(events, reports, CHAT, (annotator,))

    events = [chunk("a"), chunk("bcd"), chunk("", "stop"), DONE]
    sent = collect(stream, events, Reports(TRIPPED, margins=MARGINS))
    assert sent[-1] == DONE
    return [json.loads(event.removeprefix("data: ")) for event in sent[:-1]]


def test_a_stream_has_no_chunk_of_its_own_for_a_client_that_did_not_ask() -> None:
    first, middle, last = rewrite(separate=False)
    assert first["prompt_filter_results"] == [
        {"prompt_index": 0, "content_filter_results": {"p": SAFE, "q": SAFE}}
    ]
    assert not middle.keys() & {"prompt_filter_results"}
    assert "content_filter_results" not in middle["choices"][0]
    # The probe that stopped it is p; q is far below its threshold.
    assert last["choices"][0]["content_filter_results"] == {
        "p": {"filtered": True, "detected": True},
        "q": SAFE,
    }


def test_offsets_come_in_a_chunk_of_their_own_when_asked_for() -> None:
    *_, last = rewrite(separate=True)
    (choice,) = last["choices"]
    assert "delta" not in choice
    # Four characters: "a" and "bcd".
    assert choice["content_filter_offsets"] == {
        "check_offset": 4,
        "start_offset": 0,
        "end_offset": 4,
    }
    assert choice["content_filter_results"]["p"]["filtered"]


def test_a_whole_answer_has_a_result_for_each_prompt_and_choice() -> None:
    annotator = AzureAnnotator(num_choices=4, choices_per_prompt=2, separate=False)
    body: dict[str, Any] = {"choices": [{"index": i, "finish_reason": "stop"} for i in range(4)]}
    add_guard(body, Reports(PASSED, PASSED, PASSED, TRIPPED, margins=MARGINS), (annotator,))
    assert [one["prompt_index"] for one in body["prompt_filter_results"]] == [0, 1]
    filtered = [choice["content_filter_results"]["p"]["filtered"] for choice in body["choices"]]
    assert filtered == [False, False, False, True]


def test_a_token_without_a_score_is_an_error_not_a_pass() -> None:
    annotator = AzureAnnotator(num_choices=1, choices_per_prompt=1, separate=False)
    body: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": "stop"}]}
    add_guard(body, Reports(PASSED, margins=None), (annotator,))
    assert body["choices"][0]["content_filter_results"]["error"]["code"] == "unscored"
