"""The score of each token, for an admin: all of them, once, and no text that was not delivered."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import httpx
import jsonschema
import pytest

from ...clients.conftest import Guarded
from .conftest import MODEL, REFUSAL, Server, user

BENIGN = "Tell me the capital of Italy in one sentence."
"""Answered with "The capital of Italy is Rome."."""
PROMPT_TRIPS = "Do you like the zebra?"
COMPLETION_TRIPS = "Tell me the capital of France in one sentence."
"""Answered with "The capital of France is Paris.", which trips at its last word."""
PARTIAL = "The capital of France is"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def ask(server: Server, text: str | None = None, *, path: str = CHAT, **fields: Any) -> Any:
    headers = fields.pop("headers", server.admin)
    body = {"model": MODEL, "temperature": 0, "max_tokens": 16, "guard": {"token_scores": True}}
    if text is not None:
        body["messages"] = user(text)
    return server.http.post(path, json=body | fields, headers=headers)


def chunks(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    *events, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(choice: Any) -> str:
    part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return part.get("content") or ""


def completion_text(items: list[Any]) -> str:
    return "".join(item["token"] or "" for item in items if item["phase"] == "completion")


def streamed(answer: Any) -> dict[int, list[Any]]:
    """The items of each choice of a stream, whose every chunk has those of its own text."""
    found: dict[int, list[Any]] = defaultdict(list)
    for chunk in chunks(answer):
        for choice in chunk["choices"]:
            items = choice["token_scores"]
            assert completion_text(items) == text_of(choice)
            found[choice["index"]] += items
    return found


def check(items: list[Any], report: Any) -> None:
    """Gapless, and the highest one is the report's."""
    assert [item["index"] for item in items] == list(range(len(items)))
    phases = [item["phase"] for item in items]
    assert phases == sorted(phases, reverse=True), "the prompt comes first"
    first, *judged = items
    assert (first["score"], first["probe"], first["threshold"]) == (None, None, None)
    closest = max(judged, key=lambda item: item["score"] - item["threshold"])
    for name in ("score", "probe", "threshold"):
        assert closest[name] == report[name]
    # A maximum that stays is reported where it was reached.
    assert closest["index"] == report["token_index"]


def test_a_stream_says_the_score_of_each_token_with_its_text(server: Server) -> None:
    plain = ask(server, BENIGN, guard=None).json()["choices"][0]
    answer = ask(server, BENIGN, stream=True)
    first, *_, last = chunks(answer)
    (items,) = streamed(answer).values()
    check(items, last["choices"][0]["guard"])
    assert last["choices"][0]["guard"]["tripped"] is False
    assert completion_text(items) == plain["message"]["content"]
    prompt = first["choices"][0]["token_scores"]
    assert {item["phase"] for item in prompt} == {"prompt"}
    # The template's words, too, as they are judged as well.
    assert f"<|im_start|>user\n{BENIGN}<|im_end|>" in "".join(item["token"] for item in prompt)
    assert "token_ids" not in answer.text.replace('token_ids":null', ""), "nobody asked for them"


def test_a_whole_answer_has_the_scores_of_its_stream(server: Server) -> None:
    (from_stream,) = streamed(ask(server, BENIGN, stream=True)).values()
    whole = ask(server, BENIGN).json()
    (choice,) = whole["choices"]
    check(choice["token_scores"], choice["guard"])
    assert completion_text(choice["token_scores"]) == choice["message"]["content"]
    assert len(choice["token_scores"]) == whole["usage"]["total_tokens"]
    scores = [
        [one["score"] for one in items[1:]] for items in (choice["token_scores"], from_stream)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert choice["token_ids"] is None and whole["prompt_token_ids"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_trips_has_a_score_and_no_text(server: Server, stream: bool) -> None:
    answer = ask(server, COMPLETION_TRIPS, stream=stream)
    choice = chunks(answer)[-1]["choices"][0] if stream else answer.json()["choices"][0]
    items = streamed(answer)[0] if stream else choice["token_scores"]
    assert completion_text(items) == PARTIAL
    *_, before, last = items
    guard = choice["guard"]
    assert (last["index"], last["token"], last["probe"]) == (guard["token_index"], None, "paris")
    assert last["score"] == guard["score"] >= last["threshold"] == guard["threshold"]
    assert before["token"] == " is" and before["score"] < before["threshold"]
    assert "Paris" not in answer.text.replace(COMPLETION_TRIPS, "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_may_trip_at_once(server: Server, stream: bool) -> None:
    answer = ask(server, path=COMPLETIONS, prompt=PARTIAL, stream=stream)
    if stream:
        (items,) = streamed(answer).values()
    else:
        items = answer.json()["choices"][0]["token_scores"]
    assert "".join(item["token"] or "" for item in items) == PARTIAL
    assert (items[-1]["phase"], items[-1]["token"]) == ("completion", None)
    assert items[-1]["score"] >= items[-1]["threshold"]
    assert [item["index"] for item in items] == list(range(len(items)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_trips_has_its_scores_beside_the_report(server: Server, stream: bool) -> None:
    answer = ask(server, PROMPT_TRIPS, stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    items, guard = error["token_scores"], error["guard"]
    check(items, guard)
    assert {item["phase"] for item in items} == {"prompt"}
    # The client's own words are no secret.
    assert (items[-1]["index"], items[-1]["token"]) == (guard["token_index"], " zebra")


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer none"}, {"api-key": "cb-none"}])
@pytest.mark.parametrize("text", [BENIGN, PROMPT_TRIPS])
def test_only_an_admin_gets_them(server: Server, headers: dict[str, str], text: str) -> None:
    answer = ask(server, text, headers=headers)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("insufficient_permissions", "guard.token_scores")
    assert "without an admin key, expected one" in error["message"]
    assert "leave it out, or" in error["message"]
    without = ask(server, BENIGN, headers=headers, guard={"token_scores": False})
    assert "token_scores" not in without.json()["choices"][0]


def test_a_key_that_may_generate_is_no_admins(guarded: Guarded) -> None:
    def asked_with(key: str) -> Any:
        body = {"model": MODEL, "max_tokens": 2, "messages": user("hi")}
        return httpx.post(
            f"{guarded.url}/chat/completions",
            json=body | {"guard": {"token_scores": True}},
            headers={"Authorization": f"Bearer {key}"},
            timeout=120,
        )

    refused = asked_with(guarded.key)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_permissions"
    assert asked_with(guarded.admin_key).status_code == 200


def test_what_would_hide_tokens_is_refused(server: Server) -> None:
    answer = ask(server, BENIGN, include_reasoning=False)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "include_reasoning")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": user("hi")}),
        ("/v1/moderations", {"input": "hi"}),
    ],
)
def test_routes_without_choices_have_no_place_for_them(
    server: Server, path: str, fields: Any
) -> None:
    body = {"model": MODEL, "max_tokens": 2, "guard": {"token_scores": True}} | fields
    answer = server.http.post(path, json=body, headers=server.admin)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "guard.token_scores"
    assert "has no choices to put them in; leave it out" in error["message"]


@pytest.mark.parametrize("value", ["yes", 1, None, []])
def test_the_field_is_true_or_false(server: Server, value: Any) -> None:
    answer = ask(server, BENIGN, guard={"token_scores": value})
    assert answer.status_code == 400
    assert "token_scores (true or false)" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_has_its_own(server: Server, stream: bool) -> None:
    answer = ask(server, BENIGN, n=2, temperature=1, max_tokens=8, stream=stream)
    if stream:
        found = streamed(answer)
        ends = [c for chunk in chunks(answer) for c in chunk["choices"] if c["finish_reason"]]
        reports = {choice["index"]: choice["guard"] for choice in ends}
    else:
        choices = answer.json()["choices"]
        found = {choice["index"]: choice["token_scores"] for choice in choices}
        reports = {choice["index"]: choice["guard"] for choice in choices}
        for choice in choices:
            assert completion_text(choice["token_scores"]) == text_of(choice)
    assert found.keys() == {0, 1}
    for index, items in found.items():
        check(items, reports[index])


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_has_its_own(server: Server, stream: bool) -> None:
    prompts = ["The capital of Italy is", "One, two, three," * 8]
    # Nearly greedy, of which there may be one choice only.
    fields = {"n": 2, "temperature": 0.01, "max_tokens": 6, "ignore_eos": True}
    answer = ask(server, path=COMPLETIONS, prompt=prompts, stream=stream, **fields)
    if stream:
        found = streamed(answer)
    else:
        found = {one["index"]: one["token_scores"] for one in answer.json()["choices"]}
        for choice in answer.json()["choices"]:
            assert completion_text(choice["token_scores"]) == text_of(choice)
    assert found.keys() == {0, 1, 2, 3}
    for index, items in found.items():
        prompt = "".join(item["token"] for item in items if item["phase"] == "prompt")
        assert prompt == prompts[index // 2]
        assert [item["index"] for item in items] == list(range(len(items)))
        assert sum(item["phase"] == "completion" for item in items) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens_are_whole(server: Server, stream: bool) -> None:
    text = "Où? 🦓 日本"
    # A grammar, so that the model says it.
    answer = ask(
        server, "Say it.", structured_outputs={"choice": [text]}, max_tokens=40, stream=stream
    )
    (items,) = (
        streamed(answer).values() if stream else [answer.json()["choices"][0]["token_scores"]]
    )
    assert completion_text(items) == text
    tokens = [item["token"] for item in items if item["phase"] == "completion"]
    assert "" in tokens, "the first bytes of a character say nothing yet"


def test_no_token_comes_before_its_text(server: Server) -> None:
    """vLLM keeps back what may become a stop string, and the stop string itself."""
    items, text = [], ""
    for chunk in chunks(ask(server, BENIGN, stop=["of Ita", "xxxxxxxxxx"], stream=True)):
        (choice,) = chunk["choices"]
        items += choice["token_scores"]
        text += text_of(choice)
        assert text.startswith(completion_text(items))
    assert completion_text(items) == text == "The capital "
    # The token that completed it was judged, and is withheld.
    *_, before, last = items
    assert (before["token"], last["token"]) == (" ", None)


def test_what_a_parser_makes_of_the_text_has_all_of_its_tokens(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "f"}}
    answer = ask(server, BENIGN, tools=[tool], tool_choice=named, stream=True, max_tokens=64)
    items, arguments = [], ""
    for chunk in chunks(answer):
        for choice in chunk["choices"]:
            items += choice["token_scores"]
            for call in choice["delta"].get("tool_calls") or ():
                arguments += call["function"].get("arguments") or ""
    assert [item["index"] for item in items] == list(range(len(items)))
    assert arguments and arguments in completion_text(items)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [PROMPT_TRIPS, COMPLETION_TRIPS])
def test_a_refusal_leaves_no_token_of_what_it_replaces(
    server: Server, text: str, stream: bool
) -> None:
    headers = server.admin | {"X-Breaker-Policy": "refusing"}
    answer = ask(server, text, headers=headers, stream=stream)
    found = chunks(answer) if stream else [answer.json()]
    *_, last = choices = [chunk["choices"][0] for chunk in found]
    items = [item for choice in choices for item in choice["token_scores"]]
    assert text_of(last) == REFUSAL
    assert completion_text(last["token_scores"]) == ""
    assert items[-1]["score"] >= items[-1]["threshold"]
    check(items, last["guard"])


def test_an_error_for_a_trip_has_the_scores_and_no_text(server: Server) -> None:
    headers = server.admin | {"X-Breaker-Policy": "failing"}
    error = ask(server, COMPLETION_TRIPS, headers=headers).json()["error"]
    check(error["token_scores"], error["guard"])
    assert completion_text(error["token_scores"]) == ""
    assert error["token_scores"][-1]["phase"] == "completion"
    *_, last = chunks(ask(server, COMPLETION_TRIPS, headers=headers, stream=True))
    (item,) = last["error"]["token_scores"][-1:]
    assert (item["index"], item["token"]) == (error["guard"]["token_index"], None)


def test_what_was_asked_of_vllm_stays(server: Server) -> None:
    choice = ask(server, BENIGN, return_token_ids=True, logprobs=True).json()["choices"][0]
    num_completion = sum(item["phase"] == "completion" for item in choice["token_scores"])
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == num_completion
    echo = ask(server, path=COMPLETIONS, prompt="hi", echo=True)
    assert (echo.status_code, echo.json()["error"]["param"]) == (400, "echo")


def test_answers_are_as_documented(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for path, operation in document["paths"].items():
        content = operation.get("post", {}).get("requestBody", {}).get("content")
        if content is not None:
            guard = content["application/json"]["schema"]["properties"]["guard"]
            assert ("token_scores" in guard["properties"]) == (path in (CHAT, COMPLETIONS))

    def validate(body: Any, name: str) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(body, schema)

    whole = ask(server, COMPLETION_TRIPS).json()
    validate(whole, "ChatAnswer")
    validate(ask(server, path=COMPLETIONS, prompt=PARTIAL).json(), "CompletionAnswer")
    error = ask(server, PROMPT_TRIPS).json()
    validate(error, "Error")
    # The document says something of each item.
    whole["choices"][0]["token_scores"][0]["phase"] = "nowhere"
    error["error"]["token_scores"][0]["index"] = None
    for body, name in ((whole, "ChatAnswer"), (error, "Error")):
        with pytest.raises(jsonschema.ValidationError):
            validate(body, name)
