"""What a client sees of a trip under each action, on a live engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import openai
import pytest

from circuit_breakers.api.trip_actions import act_on_stream
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.policies.served_policy import ServedPolicy

from ..metrics.test_guard import TRIP, report
from ..policies.test_tightening import OWN
from .conftest import MODEL, REFUSAL, Server, user

PROMPT_TRIPS = "Do you like the zebra?"
COMPLETION_TRIPS = "Tell me the capital of France in one sentence."
"""Answered with "The capital of France is Paris.", which trips at its last word."""
PARTIAL = "The capital of France is"


def ask(server: Server, policy: str, text: str, **changes: Any) -> Any:
    return server.openai.chat.completions.create(
        model=MODEL,
        messages=user(text),
        temperature=0,
        max_tokens=16,
        extra_headers={"X-Breaker-Policy": policy},
        **changes,
    )


def events(server: Server, policy: str, text: str, **changes: Any) -> list[str]:
    """The data of each event of a stream, as it came."""
    body = {"model": MODEL, "messages": user(text), "temperature": 0, "max_tokens": 16}
    answer = server.http.post(
        "/v1/chat/completions",
        json=body | {"stream": True} | changes,
        headers={"X-Breaker-Policy": policy},
    )
    assert answer.status_code == 200
    return [e.removeprefix("data: ") for e in answer.text.split("\n\n") if e]


def outcomes(server: Server, policy: str) -> dict[str, float]:
    start = f'circuit_breakers_requests_total{{model="{MODEL}",outcome="'
    return {
        name.removeprefix(start).partition('"')[0]: value
        for name, value in server.metrics().items()
        if name.startswith(start) and f'policy="{policy}"' in name and value
    }


@pytest.mark.parametrize(
    ("text", "phase"), [(PROMPT_TRIPS, "prompt"), (COMPLETION_TRIPS, "completion")]
)
def test_refuse_puts_its_text_in_the_place_of_the_answer(
    server: Server, text: str, phase: str
) -> None:
    before = outcomes(server, "refusing")
    answer = ask(server, "refusing", text, logprobs=True)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", REFUSAL)
    assert (choice.finish_reason, choice.logprobs) == ("content_filter", None)
    assert PARTIAL not in answer.model_dump_json()
    guard = choice.model_extra["guard"]
    assert (guard["policy"], guard["tripped"], guard["phase"]) == ("refusing", True, phase)
    after = outcomes(server, "refusing")
    outcome = f"tripped_{phase}"
    assert after == before | {outcome: before.get(outcome, 0) + 1}


@pytest.mark.parametrize(("text", "partial"), [(PROMPT_TRIPS, ""), (COMPLETION_TRIPS, PARTIAL)])
def test_refuse_ends_a_stream_with_its_text(server: Server, text: str, partial: str) -> None:
    options: Any = {"stream_options": {"include_usage": True}}
    chunks = list(ask(server, "refusing", text, stream=True, **options))
    deltas = [c.delta for chunk in chunks for c in chunk.choices]
    assert "".join(d.content or "" for d in deltas) == partial + REFUSAL
    assert [d.role for d in deltas if d.role] == ["assistant"]
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices]
    assert [r for r in reasons if r] == ["content_filter"]
    assert chunks[-1].usage is not None


def test_a_refused_prompt_is_no_leak_though_its_usage_has_all_of_it(server: Server) -> None:
    leaked = "circuit_breakers_leaked_tokens_total"
    trips = (
        f'circuit_breakers_trips_total{{action="stopped",model="{MODEL}",phase="prompt",'
        'policy="refusing"}'
    )
    before = server.metrics()
    assert ask(server, "refusing", PROMPT_TRIPS).usage.completion_tokens == 0
    completions = server.openai.completions.create(
        model=MODEL,
        prompt=["I like the zebra and the horse", "I like the"],
        temperature=0.5,
        n=2,
        max_tokens=2,
        extra_headers={"X-Breaker-Policy": "refusing"},
    )
    assert [c.text == REFUSAL for c in completions.choices] == [True, True, False, False]
    after = server.metrics()
    assert after[leaked] == before[leaked]
    # One of the chat, and one of each choice of the prompt that tripped.
    assert after[trips] - before[trips] == 3


def test_refuse_replaces_stopped_choices_only(server: Server) -> None:
    texts = ["I like the zebra", "I like the"]
    answer = server.openai.completions.create(
        model=MODEL,
        prompt=texts,
        temperature=0,
        max_tokens=4,
        extra_headers={"X-Breaker-Policy": "refusing"},
    )
    stopped, other = answer.choices
    assert (stopped.text, stopped.finish_reason) == (REFUSAL, "content_filter")
    assert other.finish_reason == "length" and other.text not in ("", REFUSAL)


@pytest.mark.parametrize(
    ("text", "phase"), [(PROMPT_TRIPS, "prompt"), (COMPLETION_TRIPS, "completion")]
)
def test_error_answers_a_trip_with_a_400(server: Server, text: str, phase: str) -> None:
    before = outcomes(server, "failing")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "failing", text)
    assert caught.value.code == "content_filter"
    assert caught.value.response.json()["error"]["guard"]["phase"] == phase
    assert PARTIAL not in caught.value.response.text
    after = outcomes(server, "failing")
    outcome = f"tripped_{phase}"
    assert after == before | {outcome: before.get(outcome, 0) + 1}, "a trip is never an error"


def test_error_ends_a_stream_that_has_begun(server: Server) -> None:
    before = outcomes(server, "failing")
    *chunks, last, done = events(server, "failing", COMPLETION_TRIPS)
    assert done == "[DONE]"
    assert json.loads(last)["error"]["code"] == "content_filter"
    parts = [c["delta"].get("content") for e in chunks for c in json.loads(e)["choices"]]
    assert "".join(part or "" for part in parts) == PARTIAL
    assert outcomes(server, "failing").get("error") is None
    tripped = outcomes(server, "failing")["tripped_completion"]
    assert tripped == before.get("tripped_completion", 0) + 1
    with pytest.raises(openai.APIError, match="stopped by the circuit breaker"):
        list(ask(server, "failing", COMPLETION_TRIPS, stream=True))


@pytest.mark.parametrize("policy", ["default", "refusing", "failing"])
def test_what_does_not_trip_is_answered_alike(server: Server, policy: str) -> None:
    answer = ask(server, policy, "Say hello.", stream=True)
    texts = [c.delta.content or "" for chunk in answer for c in chunk.choices]
    plain = ask(server, "default", "Say hello.").choices[0]
    assert "".join(texts) == plain.message.content
    assert plain.finish_reason != "content_filter"


OTHER_FORMATS = {
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}


def post_other(server: Server, path: str, policy: str, text: str, stream: bool) -> Any:
    prompt = {"input": text} if path == "/v1/responses" else {"messages": user(text)}
    limit = {OTHER_FORMATS[path]: 16}
    return server.http.post(
        path,
        json={"model": MODEL, **prompt, **limit, "temperature": 0, "stream": stream},
        headers={"X-Breaker-Policy": policy},
    )


def texts_of(path: str, body: Any) -> list[str]:
    if path == "/v1/messages":
        return [block["text"] for block in body["content"]]
    return [part["text"] for item in body["output"] for part in item["content"]]


@pytest.mark.parametrize("path", OTHER_FORMATS)
def test_refuse_replaces_the_text_of_a_whole_answer_in_every_format(
    server: Server, path: str
) -> None:
    for text in (PROMPT_TRIPS, COMPLETION_TRIPS):
        answer = post_other(server, path, "refusing", text, stream=False)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert texts_of(path, body) == [REFUSAL]
        assert PARTIAL not in answer.text
        ends = (body.get("stop_reason"), body.get("incomplete_details"))
        assert ends in (("refusal", None), (None, {"reason": "content_filter"}))


@pytest.mark.parametrize("path", OTHER_FORMATS)
def test_refuse_has_no_place_in_a_stream_of_another_format(server: Server, path: str) -> None:
    assert post_other(server, path, "refusing", PROMPT_TRIPS, stream=True).status_code == 400
    assert _without_ids(post_other(server, path, "refusing", COMPLETION_TRIPS, stream=True)) == (
        _without_ids(post_other(server, path, "default", COMPLETION_TRIPS, stream=True))
    )


def _without_ids(answer: Any) -> list[str]:
    """Which events came, in order."""
    assert answer.status_code == 200
    return [line for line in answer.text.split("\n") if line.startswith("event: ")]


@pytest.mark.parametrize("path", OTHER_FORMATS)
@pytest.mark.parametrize("stream", [False, True])
def test_error_withholds_an_answer_in_every_format(server: Server, path: str, stream: bool) -> None:
    before = outcomes(server, "failing").get("tripped_completion", 0)
    answer = post_other(server, path, "failing", COMPLETION_TRIPS, stream=stream)
    assert outcomes(server, "failing")["tripped_completion"] == before + 1
    if not stream:
        assert answer.status_code == 400
        assert PARTIAL not in answer.text
        return
    assert answer.status_code == 200
    last = [e for e in answer.text.split("\n\n") if e][-1]
    assert last.startswith("event: error\n") and "content_filter" in last
    ends = ("response.completed", "response.incomplete", "message_delta", "message_stop")
    assert not any(f"event: {end}\n" in answer.text for end in ends)


class Session:
    """Reports of a session in which choice 0 was stopped and choice 1 was not."""

    def report_for(self, choice: int) -> GuardReport:
        return report(**(TRIP if choice == 0 else {}))


def last_chunk(index: int, **choice: Any) -> str:
    body = {"choices": [{"index": index, "finish_reason": "content_filter", **choice}]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def acted(action: Any, *events: str) -> list[Any]:
    """What is left of scripted events, parsed; and that their source was closed."""
    served = ServedPolicy(policy=OWN.policy, action=action, refusal=REFUSAL)
    closed = []

    async def source() -> AsyncGenerator[str, None]:
        try:
            for event in events:
                yield event
        finally:
            closed.append(True)

    async def collect() -> list[str]:
        session: Any = Session()
        return [event async for event in act_on_stream(source(), session, served)]

    left = asyncio.run(collect())
    assert closed == [True]
    return [json.loads(e.removeprefix("data: ")) if "{" in e else e for e in left]


def test_text_that_comes_with_the_end_is_withheld() -> None:
    """As for a client that reads so slowly that tokens have piled up."""
    first = "data: {}\n\n"
    end = last_chunk(0, delta={"content": " is"}, logprobs={"content": [1]}, token_ids=[7])
    _, chunk = acted("refuse", first, end)
    (choice,) = chunk["choices"]
    assert choice["delta"] == {"content": REFUSAL}
    assert (choice["logprobs"], choice["token_ids"]) == (None, None)
    assert choice["finish_reason"] == "content_filter"
    (alone,) = acted("refuse", end)
    assert alone["choices"][0]["delta"] == {"role": "assistant", "content": REFUSAL}
    (completion,) = acted("refuse", last_chunk(0, text=" is"))
    assert completion["choices"][0]["text"] == REFUSAL
    error, done = acted("error", end, first)
    assert error["error"]["code"] == "content_filter" and " is" not in str(error)
    assert done == "data: [DONE]\n\n"


def test_a_choice_that_was_not_stopped_is_left_alone() -> None:
    end = last_chunk(1, delta={"content": " is"})
    for action in ("stop", "refuse", "error"):
        (chunk,) = acted(action, end)
        assert chunk["choices"][0]["delta"] == {"content": " is"}
    (stopped,) = acted("stop", last_chunk(0, delta={"content": " is"}))
    assert stopped["choices"][0]["delta"] == {"content": " is"}
