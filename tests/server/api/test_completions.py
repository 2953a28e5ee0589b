"""The completion routes end to end: a real client, a real server, a real model, foreseen trips.

Asked for one sentence, the model says with a margin "The capital of France is Paris." and "The
capital of Italy is Rome."; " Paris" and " zebra" are the words that trip (breaker_for_words.py).
"""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from .conftest import MODEL, Server

FRANCE = "Tell me the capital of France in one sentence."
ITALY = "Tell me the capital of Italy in one sentence."
BEFORE_PARIS = "The capital of France is"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(server: Server, text: str, **more: Any) -> Any:
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 32} | more
    return server.openai.chat.completions.create(messages=user(text), **fields)


def complete(server: Server, prompt: Any, **more: Any) -> Any:
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 6} | more
    return server.openai.completions.create(prompt=prompt, **fields)


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
