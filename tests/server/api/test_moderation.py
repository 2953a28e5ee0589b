"""OpenAI's moderation objects, read back through the client's own models."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Moderation as ChatModerationObject
from openai.types.chat.chat_completion_chunk import Moderation as ChunkModerationObject
from openai.types.responses.response import Moderation as ResponseModerationObject

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.moderation import (
    ChatModeration,
    ResponseModeration,
    check_moderation_model,
    conversations,
    moderation_request,
    moderation_result,
)
from circuit_breakers.api.responses import DONE, StreamShape, add_guard, guard_stream

from .guard_reports import PASSED, TRIPPED, Reports, collect

MARGINS: Any = {"prompt": {"p": -1.0, "q": 0.0}, "completion": {"p": -800.0, "q": 800.0}}


def test_the_threshold_is_one_half_and_the_ends_are_zero_and_one() -> None:
    result = moderation_result({"a": 0.0, "b": -1e-3, "c": float("-inf"), "d": 900.0, "e": -900.0})
    assert result["categories"] == {"a": True, "b": False, "c": False, "d": True, "e": False}
    assert result["flagged"] is True
    scores = result["category_scores"]
    assert (scores["a"], scores["c"], scores["d"], scores["e"]) == (0.5, 0.0, 1.0, 0.0)
    # 1 / (1 + e ** 0.001)
    assert scores["b"] == pytest.approx(0.49975, abs=1e-6)


def test_scores_grow_with_the_margin() -> None:
    scores = [
        moderation_result({"p": margin / 10})["category_scores"]["p"] for margin in range(-90, 90)
    ]
    assert scores == sorted(scores)
    assert all(0 <= score <= 1 for score in scores)


def test_a_chat_has_a_result_for_each_choice() -> None:
    moderation = ChatModeration("b", 2).result(Reports(PASSED, TRIPPED, margins=MARGINS))
    for model in (ChatModerationObject, ChunkModerationObject):
        read: Any = model.model_validate(moderation, strict=True)
        assert (read.input.type, read.input.model) == ("moderation_results", "b")
        assert [result.flagged for result in read.input.results] == [True]
        assert [result.flagged for result in read.output.results] == [True, True]
        assert read.input.results[0].categories == {"p": False, "q": True}
        assert read.input.results[0].category_applied_input_types == {"p": ["text"], "q": ["text"]}


def test_a_response_has_one_result_for_each_phase() -> None:
    moderation = ResponseModeration("b", 1).result(Reports(PASSED, margins=MARGINS))
    read: Any = ResponseModerationObject.model_validate(moderation, strict=True)
    assert (read.input.type, read.input.model, read.input.flagged) == (
        "moderation_result",
        "b",
        True,
    )
    assert read.output.category_scores == {"p": 0.0, "q": 1.0}


@pytest.mark.parametrize("kind", [ChatModeration, ResponseModeration])
def test_a_token_without_a_score_is_an_error_not_a_pass(kind: Any) -> None:
    moderation = kind("b", 1).result(Reports(PASSED, margins=None))
    model: Any = ChatModerationObject if kind is ChatModeration else ResponseModerationObject
    read = model.model_validate(moderation, strict=True)
    assert (read.input.type, read.input.code) == ("error", "unscored")
    assert read.output.type == "error"


def test_a_whole_chat_carries_it() -> None:
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": "x"},
            }
        ],
    }
    add_guard(body, Reports(PASSED, margins=MARGINS), (ChatModeration("b", 1),))
    read = ChatCompletion.model_validate(body)
    assert read.moderation is not None
    assert read.moderation.input.type == "moderation_results"


def test_a_stream_has_it_in_one_chunk_after_the_choices_and_before_usage() -> None:
    shape = StreamShape(id="chatcmpl-1", object="chat.completion.chunk", model="m", num_choices=1)
    usage = 'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":3}}\n\n'
    word = (
        'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
        '"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
    )

    def stream(events: Any, reports: Reports, _: Any) -> Any:
        return guard_stream(events, reports, shape, (ChatModeration("b", 1),))

    for tail in ([usage, DONE], [DONE]):
        sent = collect(stream, [word, word, *tail], Reports(TRIPPED, margins=MARGINS))
        assert sent[-len(tail) :] == tail
        read = ChatCompletionChunk.model_validate_json(sent[3].removeprefix("data: "))
        assert read.moderation is not None
        assert (read.id, read.choices) == ("chatcmpl-1", [])
        assert sum('"moderation"' in event for event in sent) == 1


def test_block_names_the_phases_that_it_is_asked_for() -> None:
    def blocked(policy: Any) -> Any:
        request = moderation_request({"model": "b", "policy": policy}, ("b",))
        assert request is not None
        return request.blocked_phases

    score, block = {"mode": "score"}, {"mode": "block"}
    assert blocked(None) == blocked({}) == blocked({"input": score, "output": None}) == set()
    assert blocked({"input": block, "output": score}) == {"prompt"}
    assert blocked({"input": block, "output": block}) == {"prompt", "completion"}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "moderation"),
        ({}, "moderation.model"),
        ({"model": 5}, "moderation.model"),
        ({"model": "b", "mode": "off"}, "moderation.mode"),
        ({"model": "b", "policy": {"input": {"mode": "off"}}}, "moderation.policy.input.mode"),
        ({"model": "b", "policy": {"prompt": {"mode": "score"}}}, "moderation.policy.prompt"),
    ],
)
def test_another_shape_is_refused_by_name(value: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        moderation_request(value, ("b",))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_moderation_model_is_the_breaker_or_one_that_clients_name_by_themselves() -> None:
    for name in (None, "b", "omni-moderation-latest"):
        check_moderation_model(name, ("b",), param="model")
    for unknown in ("gpt-4", ["b"]):
        with pytest.raises(ApiError, match="expected one of b") as caught:
            check_moderation_model(unknown, ("b",), param="model")
        assert caught.value.status == 404


def test_inputs_become_conversations() -> None:
    def user(content: Any) -> dict[str, Any]:
        return {"role": "user", "content": content}

    part = {"type": "text", "text": "a"}
    chat = [user("a"), {"role": "assistant", "content": "b"}]
    assert conversations("a", max_inputs=2) == [[user("a")]]
    assert conversations(["a", "b"], max_inputs=2) == [[user("a")], [user("b")]]
    assert conversations([part], max_inputs=2) == [[user([part])]]
    assert conversations(chat, max_inputs=1) == [chat]


@pytest.mark.parametrize("given", [None, 5, [], {}, ["a", 5], [["a"]], ["a", {"role": "user"}]])
def test_nothing_to_judge_is_refused(given: Any) -> None:
    with pytest.raises(ApiError, match="expected a text") as caught:
        conversations(given, max_inputs=2)
    assert caught.value.param == "input"


def test_too_many_texts_are_refused() -> None:
    with pytest.raises(ApiError, match="got 3 texts"):
        conversations(["a", "b", "c"], max_inputs=2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(("model", "policy", "input", "output", "mode", "role", "content")),
            children,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_value_is_read_or_refused(value: Any) -> None:
    try:
        moderation_request(value, ("b",))
    except ApiError as error:
        assert error.status in (400, 404)
        assert (error.param or "").startswith("moderation")
    try:
        found = conversations(value, max_inputs=4)
    except ApiError as error:
        assert (error.status, error.param) == (400, "input")
    else:
        assert all(isinstance(message, dict) for messages in found for message in messages)
