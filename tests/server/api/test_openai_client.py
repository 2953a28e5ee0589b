"""The OpenAI client's own typed methods on a real server: whole, streamed, parsed and tripped."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .capitals import BEFORE_PARIS, FRANCE, ITALY, ROME
from .conftest import MODEL, Server, user


class City(BaseModel):
    name: str


def test_models_are_listed_and_retrieved(server: Server) -> None:
    assert [model.id for model in server.openai.models.list()] == [MODEL]
    assert server.openai.models.retrieve(MODEL).id == MODEL
    for unknown in ("nope", "a/b"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.openai.models.retrieve(unknown)
        assert caught.value.code == "model_not_found"


def test_a_chat_is_streamed_to_its_end(server: Server) -> None:
    with server.openai.chat.completions.stream(
        model=MODEL, messages=user(ITALY), temperature=0, max_tokens=32
    ) as stream:
        said = "".join(e.delta for e in stream if e.type == "content.delta")
        final = stream.get_final_completion()
    assert said == ROME == final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_a_tripped_stream_says_content_filter_in_the_final_completion(server: Server) -> None:
    with server.openai.chat.completions.stream(
        model=MODEL, messages=user(FRANCE), temperature=0, max_tokens=32
    ) as stream:
        said = "".join(e.delta for e in stream if e.type == "content.delta")
        snapshot = stream.current_completion_snapshot
    assert said == BEFORE_PARIS
    assert snapshot.choices[0].finish_reason == "content_filter"


def test_a_chat_is_parsed_into_a_model(server: Server) -> None:
    answer = server.openai.chat.completions.parse(
        model=MODEL,
        messages=user("Name the capital of Italy."),
        temperature=0,
        max_tokens=48,
        response_format=City,
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def paris_id(server: Server) -> str:
    """Alone at position 0, which is never judged, the word says its token id."""
    echoed = server.openai.completions.create(
        model=MODEL, prompt=" Paris", max_tokens=1, extra_body={"return_token_ids": True}
    )
    (token_id,) = (echoed.choices[0].model_extra or {})["prompt_token_ids"]
    return str(token_id)


def tripping(server: Server) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": user("Name a city."),
        "temperature": 0,
        "max_tokens": 48,
        "response_format": City,
        # The grammar lets the word in within the text, and nowhere before.
        "logit_bias": {paris_id(server): 50},
    }


def test_parse_raises_at_a_trip(server: Server) -> None:
    with pytest.raises(openai.ContentFilterFinishReasonError):
        server.openai.chat.completions.parse(**tripping(server))


def test_a_stream_that_is_parsed_raises_at_a_trip(server: Server) -> None:
    with (
        pytest.raises(openai.ContentFilterFinishReasonError),
        server.openai.chat.completions.stream(**tripping(server)) as stream,
    ):
        for _ in stream:
            pass


def test_completions_are_typed(server: Server) -> None:
    answer = server.openai.completions.create(
        model=MODEL, prompt="The capital of Italy is", temperature=0, max_tokens=2
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].text.startswith(" Rome")


@pytest.mark.parametrize(
    "policy", [None, {"input": {"mode": "block"}, "output": {"mode": "score"}}]
)
def test_a_chat_is_moderated_beside_its_answer(server: Server, policy: Any) -> None:
    moderation: Any = {"model": "omni-moderation-latest", "policy": policy}
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 32}
    for text, flagged in ((ITALY, False), (FRANCE, True)):
        answer = server.openai.chat.completions.create(
            messages=user(text), moderation=moderation, **fields
        )
        assert answer.moderation is not None
        assert answer.moderation.input.type == "moderation_results"
        assert answer.moderation.output.type == "moderation_results"
        assert [one.flagged for one in answer.moderation.input.results] == [False]
        assert [one.flagged for one in answer.moderation.output.results] == [flagged]
        assert answer.moderation.output.results[0].categories["paris"] == flagged
        chunks = list(
            server.openai.chat.completions.create(
                messages=user(text), moderation=moderation, stream=True, **fields
            )
        )
        (moderated,) = (chunk for chunk in chunks if chunk.moderation)
        assert moderated is chunks[-1]
        assert moderated.moderation.output.results[0].flagged == flagged  # type: ignore


def test_a_response_is_typed(server: Server) -> None:
    answer = server.openai.responses.create(
        model=MODEL,
        input=ITALY,
        temperature=0,
        max_output_tokens=32,
        moderation={"model": "words"},
    )
    assert (answer.status, answer.output_text) == ("completed", ROME)
    assert answer.incomplete_details is None
    assert answer.usage is not None
    assert (answer.model_extra or {})["guard"]["tripped"] is False
    assert answer.moderation is not None
    assert answer.moderation.output.type == "moderation_result"
    assert answer.moderation.output.flagged is False


def test_a_tripped_response_is_incomplete(server: Server) -> None:
    answer = server.openai.responses.create(
        model=MODEL, input=user(FRANCE), temperature=0, max_output_tokens=32
    )
    assert (answer.status, answer.output_text) == ("incomplete", BEFORE_PARIS)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "content_filter"
    guard = (answer.model_extra or {})["guard"]
    assert (guard["phase"], guard["probe"]) == ("completion", "paris")


@pytest.mark.parametrize(
    ("text", "expected", "end", "reason"),
    [
        (ITALY, ROME, "response.completed", None),
        (FRANCE, BEFORE_PARIS, "response.incomplete", "content_filter"),
    ],
)
def test_a_response_is_streamed(
    server: Server, text: str, expected: str, end: str, reason: str | None
) -> None:
    stream = server.openai.responses.create(
        model=MODEL, input=text, temperature=0, max_output_tokens=32, stream=True
    )
    events = list(stream)
    assert events[0].type == "response.created"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.type == end
    details = last.response.incomplete_details
    assert (details.reason if details else None) == reason
    assert last.response.output_text == expected
    assert last.response.guard["tripped"] == (reason is not None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tripped_prompt_of_a_response_is_a_400(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.responses.create(
            model=MODEL, input="hi", instructions="You like the zebra.", stream=stream
        )
    assert caught.value.code == "content_filter"
    assert caught.value.body["guard"]["phase"] == "prompt"  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_the_engine_refuses_is_a_400(server: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError):
        server.openai.responses.create(
            model=MODEL, input="hi", stream=stream, extra_body={"logit_bias": {"99999999": 1}}
        )


def test_a_response_calls_tools_of_the_client(server: Server) -> None:
    answer = server.openai.responses.create(
        model=MODEL,
        input="Find it.",
        tools=[
            {
                "type": "function",
                "name": "find",
                "strict": True,
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"enum": ["Rome", "Bern"]}},
                    "required": ["place"],
                    "additionalProperties": False,
                },
            }
        ],
        tool_choice="required",
        temperature=0,
        max_output_tokens=96,
    )
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert call.name == "find"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_that_trips_is_marked_as_cut_short(server: Server, stream: bool) -> None:
    parameters = {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    }
    answer: Any = server.openai.responses.create(
        model=MODEL,
        input="Find it.",
        tools=[{"type": "function", "name": "find", "strict": True, "parameters": parameters}],
        tool_choice="required",
        temperature=0,
        max_output_tokens=96,
        # The grammar lets the word in at the argument, and nowhere before.
        extra_body={"logit_bias": {paris_id(server): 50}},
        stream=stream,
    )
    if stream:
        events = list(answer)
        (done,) = (event for event in events if event.type == "response.output_item.done")
        assert (done.item.type, done.item.status) == ("function_call", "incomplete")
        answer = events[-1].response
    assert answer.incomplete_details.reason == "content_filter"
    assert [item.status for item in answer.output] == ["incomplete"]
    assert "Paris" not in answer.model_dump_json()


def test_nothing_of_a_response_is_kept(server: Server) -> None:
    answer = server.openai.responses.create(model=MODEL, input="hi", max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        server.openai.responses.create(model=MODEL, input="hi", previous_response_id=answer.id)


def test_metrics_count_responses_as_they_were_delivered(server: Server) -> None:
    def counted(outcome: str) -> str:
        labels = f'model="{MODEL}",outcome="{outcome}",policy="default"'
        return f"circuit_breakers_requests_total{{{labels}}}"

    before = server.metrics()
    for stream in (False, True):
        for text in (ITALY, FRANCE):
            answer: Any = server.openai.responses.create(
                model=MODEL, input=text, temperature=0, max_output_tokens=32, stream=stream
            )
            list(answer)
    after = server.metrics()
    assert after[counted("ok")] - before[counted("ok")] == 2
    name = counted("tripped_completion")
    assert after[name] - before[name] == 2
    held = "circuit_breakers_held_tokens_count"
    assert after[held] - before[held] == 4
    assert after["circuit_breakers_leaked_tokens_total"] == 0
