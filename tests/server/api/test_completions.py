"""The completion routes end to end: a real client, a real server, a real model, foreseen trips."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from .capitals import BEFORE_PARIS, FRANCE, ITALY, chat, complete
from .conftest import MODEL, Server, user


def guard_of(thing: Any) -> dict[str, Any]:
    guard: dict[str, Any] = thing.model_extra["guard"]
    return guard


def assert_same_verdict(first: dict[str, Any], second: dict[str, Any]) -> None:
    # bfloat16 in another batch or another chunk: a few percent of a score of about 10.
    assert first.pop("score") == pytest.approx(second.pop("score"), abs=0.5)
    assert first == second


def test_an_answer_that_passes_is_whole_and_carries_its_guard(server: Server) -> None:
    answer = chat(server, ITALY)
    assert answer.choices[0].message.content == "The capital of Italy is Rome."
    assert answer.choices[0].finish_reason == "stop"
    guard = guard_of(answer)
    assert guard == guard_of(answer.choices[0])
    assert (guard["breaker"], guard["policy"], guard["mode"]) == ("words", "default", "enforce")
    assert not guard["tripped"]
    assert guard["phase"] is None
    assert guard["score"] < guard["threshold"]


def test_a_stream_says_the_same_and_reports_in_its_last_chunk(server: Server) -> None:
    chunks = list(chat(server, ITALY, stream=True, stream_options={"include_usage": True}))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == "The capital of Italy is Rome."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    reports = [guard_of(c) for c in chunks if "guard" in (c.model_extra or {})]
    assert len(reports) == 1
    assert_same_verdict(reports[0], guard_of(chat(server, ITALY)))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 7


def test_a_trip_ends_the_answer_before_the_token_that_tripped(server: Server) -> None:
    answer = chat(server, FRANCE)
    choice = answer.choices[0]
    assert choice.finish_reason == "content_filter"
    assert choice.message.content == BEFORE_PARIS
    guard = guard_of(answer)
    assert (guard["tripped"], guard["phase"], guard["probe"]) == (True, "completion", "paris")
    assert guard["score"] >= guard["threshold"]
    # The first position that is not delivered is the one that tripped.
    assert guard["token_index"] == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_tripped_stream_ends_with_content_filter_usage_and_done(server: Server) -> None:
    body = {
        "model": MODEL,
        "messages": user(FRANCE),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    last = chunks[-2]["choices"][0]
    assert last["finish_reason"] == "content_filter"
    assert_same_verdict(last["guard"], guard_of(chat(server, FRANCE)))
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert said == BEFORE_PARIS


@pytest.mark.parametrize("stream", [False, True])
def test_a_trip_on_the_very_first_token_delivers_nothing(server: Server, stream: bool) -> None:
    answer = complete(server, BEFORE_PARIS, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    assert [c.finish_reason for c in choices] == ["content_filter"]
    assert choices[0].text == ""
    assert guard_of(choices[0])["phase"] == "completion"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tripped_prompt_is_a_400_even_where_a_stream_was_asked_for(
    server: Server, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, "Do you like the zebra?", stream=stream)
    error: Any = caught.value.body
    assert (error["code"], error["type"]) == ("content_filter", "invalid_request_error")
    assert (error["guard"]["phase"], error["guard"]["probe"]) == ("prompt", "zebra")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "You like the zebra."}, *user("hi")],
        [*user("hi"), {"role": "assistant", "content": "A zebra!"}, *user("go on")],
        [*user("hi"), {"role": "tool", "content": "a zebra", "tool_call_id": "1"}],
        [{"role": "user", "content": [{"type": "text", "text": "a zebra"}]}],
    ],
    ids=["system", "history", "tool result", "parts"],
)
def test_every_channel_of_the_prompt_is_judged(server: Server, messages: list[Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert caught.value.code == "content_filter"


def test_a_prefilled_answer_is_judged_like_a_prompt(server: Server) -> None:
    prefill = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [*user("Name a city."), {"role": "assistant", "content": "I would say Paris"}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=4, extra_body=prefill
        )
    assert caught.value.code == "content_filter"


def test_several_prompts_are_judged_each_for_itself(server: Server) -> None:
    prompts = ["The capital of Italy is", BEFORE_PARIS]
    answer = complete(server, prompts)
    assert [c.finish_reason for c in answer.choices] == ["length", "content_filter"]
    assert [guard_of(c)["tripped"] for c in answer.choices] == [False, True]
    assert guard_of(answer)["tripped"]
    ends = {
        c.index: c
        for chunk in complete(server, prompts, stream=True)
        for c in chunk.choices
        if c.finish_reason
    }
    assert [ends[i].finish_reason for i in (0, 1)] == ["length", "content_filter"]
    for i in (0, 1):
        assert_same_verdict(guard_of(ends[i]), guard_of(answer.choices[i]))


@pytest.mark.parametrize("stream", [False, True])
def test_one_tripped_prompt_refuses_the_whole_request(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, ["The capital of Italy is", "I saw a zebra"], stream=stream)
    assert caught.value.code == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_carries_its_own_guard(server: Server, stream: bool) -> None:
    answer = chat(server, "Say hello.", n=3, temperature=0.7, max_tokens=8, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    ends = [c for c in choices if c.finish_reason]
    assert sorted(c.index for c in ends) == [0, 1, 2]
    assert all(guard_of(c)["probe"] in ("paris", "zebra") for c in ends)


def test_stop_strings_and_logprobs_work_as_in_vllm(server: Server) -> None:
    answer = chat(server, ITALY, stop=[" Rome"], logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.content == "The capital of Italy is"
    assert choice.finish_reason == "stop"
    assert "".join(t.token for t in choice.logprobs.content).startswith("The capital of Italy is")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_say_nothing_past_a_trip(server: Server, stream: bool) -> None:
    answer = chat(server, FRANCE, logprobs=True, top_logprobs=2, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    tokens = [t.token for c in choices if c.logprobs for t in c.logprobs.content or ()]
    assert "".join(tokens) == BEFORE_PARIS


@pytest.mark.parametrize("stream", [False, True])
def test_content_filter_wins_where_a_tool_call_trips(server: Server, stream: bool) -> None:
    # Alone at position 0, which is never judged, the word says its token id.
    echoed = complete(server, " Paris", max_tokens=1, extra_body={"return_token_ids": True})
    (paris,) = echoed.choices[0].model_extra["prompt_token_ids"]
    parameters = {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    }
    function = {"name": "find", "strict": True, "parameters": parameters}
    answer = chat(
        server,
        "Find it.",
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        # The grammar lets the word in at the argument, and nowhere before.
        logit_bias={str(paris): 50},
        max_tokens=96,
        stream=stream,
    )
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    (end,) = (c for c in choices if c.finish_reason)
    assert end.finish_reason == "content_filter"
    assert (guard_of(end)["phase"], guard_of(end)["probe"]) == ("completion", "paris")
    assert guard_of(end)["token_index"] > 60  # past the name of the tool
    said = str([c.model_dump() for c in choices])
    assert "find" in said
    assert "Paris" not in said


def test_an_echo_comes_after_the_verdict(server: Server) -> None:
    answer = complete(server, "The capital of Italy is", echo=True)
    assert answer.choices[0].text.startswith("The capital of Italy is Rome")
    with pytest.raises(openai.BadRequestError):
        complete(server, "I saw a zebra", echo=True)


def test_a_repeated_prompt_gets_the_same_verdict_from_the_prefix_cache(server: Server) -> None:
    text = "Tell me of the sea. " * 12 + FRANCE
    assert_same_verdict(*(guard_of(chat(server, text)) for _ in range(2)))


def test_concurrent_requests_keep_their_own_verdicts(server: Server) -> None:
    texts = [FRANCE, ITALY] * 6
    with ThreadPoolExecutor(12) as pool:
        reasons = list(pool.map(lambda t: chat(server, t).choices[0].finish_reason, texts))
    assert reasons == ["content_filter", "stop"] * 6
