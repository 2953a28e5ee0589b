"""A server without a guard: nothing of what it says gets through, unless that is asked for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from circuit_breakers_client import (
    AsyncCircuitBreakers,
    CircuitBreakers,
    UnguardedError,
    guard_of,
)

from ..conftest import LABELS, Unguarded

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def client_of(server: Unguarded, **arguments: Any) -> CircuitBreakers:
    return CircuitBreakers(base_url=server.url, api_key="none", max_retries=0, **arguments)


@pytest.mark.parametrize("model", ["m", "says-text", *LABELS])
def test_no_answer_gets_through(unguarded: Unguarded, model: str) -> None:
    client = client_of(unguarded)
    with pytest.raises(UnguardedError):
        client.chat.completions.create(**CHAT | {"model": model})
    with pytest.raises(UnguardedError):
        client.post("/chat/completions?x=1", cast_to=object, body=CHAT | {"model": model})
    client.close()


@pytest.mark.parametrize("model", LABELS)
def test_nor_does_one_that_is_parsed_later(unguarded: Unguarded, model: str) -> None:
    client = client_of(unguarded)
    raw = client.responses.with_raw_response.create(model=model, input="hi")
    with pytest.raises(UnguardedError):
        raw.parse()
    client.close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nor_does_one_from_elsewhere(unguarded: Unguarded, status: int) -> None:
    client = client_of(unguarded)
    client = client.with_options(base_url=f"{unguarded.url}/moved/{status}")
    with pytest.raises(UnguardedError):
        client.chat.completions.create(**CHAT)
    assert unguarded.asked[-1] == "/elsewhere"
    client.close()


def test_nor_does_one_that_was_kept(unguarded: Unguarded) -> None:
    client = client_of(unguarded)
    for ask in (
        lambda: client.responses.retrieve("kept"),
        lambda: client.responses.cancel("kept"),
        lambda: client.responses.compact(model="m"),
        lambda: client.chat.completions.retrieve("kept"),
    ):
        with pytest.raises(UnguardedError):
            ask()
    # A kept one can be streamed too.
    with pytest.raises(UnguardedError, match="HTTP 404 on /v1/breaker"):
        client.responses.retrieve("kept", stream=True)
    client.close()


def test_nor_completions_responses_and_raw_answers(unguarded: Unguarded) -> None:
    client = client_of(unguarded)
    with pytest.raises(UnguardedError):
        client.completions.create(model="m", prompt="hi")
    with pytest.raises(UnguardedError):
        client.responses.create(model="m", input="hi")
    with pytest.raises(UnguardedError):
        client.post("/chat/completions", cast_to=object, body=CHAT)
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    with pytest.raises(UnguardedError):
        raw.parse()
    client.close()


def test_a_stream_is_not_even_asked_for(unguarded: Unguarded) -> None:
    client = client_of(unguarded)
    with pytest.raises(UnguardedError, match="HTTP 404 on /v1/breaker"):
        client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(UnguardedError), client.chat.completions.stream(**CHAT) as stream:
        stream.until_done()
    assert set(unguarded.asked) == {"/v1/breaker"}
    client.close()


@pytest.mark.parametrize("model", ["m", "says-done"])
def test_a_stream_without_a_report_ends_in_an_error(unguarded: Unguarded, model: str) -> None:
    """As when another replica, without a guard, answers than the one that said it has a breaker."""
    client = client_of(unguarded)
    client._has_breaker = True
    with pytest.raises(UnguardedError):
        list(client.chat.completions.create(**CHAT | {"model": model}, stream=True))
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        "<html>welcome</html>",
        "null",
        "[]",
        "{}",
        '{"object": "breaker"}',
        '{"object": "breaker", "digest": null}',
        '{"object": "list", "digest": "d"}',
    ],
)
def test_no_stream_is_begun_where_anything_is_found(answer: str) -> None:
    """As where a web page, or a gateway, says 200 to every path."""
    asked: list[str] = []
    label = "text/html" if answer.startswith("<") else "application/json"

    def found(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, text=answer, headers={"Content-Type": label})

    with client_on(found) as client:
        for ask in (
            client.breaker.retrieve,
            lambda: client.chat.completions.create(**CHAT, stream=True),
        ):
            with pytest.raises(UnguardedError, match="something else than a breaker"):
                ask()
    assert set(asked) == {"/v1/breaker"}


GUARD = {"breaker": "b", "policy": "p", "mode": "enforce", "tripped": False}


def choice(delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": None, "delta": delta} | fields]}


ENDED = choice({"content": "hi"}, finish_reason="stop", guard=GUARD)
RESPONSE_ENDED = {"type": "response.completed", "response": {"id": "x", "guard": GUARD}}


@pytest.mark.parametrize(
    ("path", "events"),
    [
        ("chat", [ENDED, choice({"content": "more"})]),
        ("chat", [ENDED, choice({"content": "more"}, finish_reason="stop", guard=GUARD)]),
        ("chat", [ENDED, choice({"reasoning": "more"})]),
        ("chat", [ENDED, choice({"tool_calls": [{"index": 0, "function": {"name": "more"}}]})]),
        ("completions", [choice({}, text="hi", finish_reason="stop", guard=GUARD)] * 2),
        ("responses", [RESPONSE_ENDED, {"type": "response.output_text.delta", "delta": "more"}]),
        ("responses", [RESPONSE_ENDED, {"type": "response.refusal.delta", "delta": "more"}]),
    ],
)
def test_text_after_its_report_is_withheld(path: str, events: list[dict[str, Any]]) -> None:
    with streaming(events) as client:
        read = list_of(client, path)
        assert next(read)
        with pytest.raises(UnguardedError, match="text after its report"):
            next(read)
    with streaming(events, require_guard=False) as client:
        assert len(list(list_of(client, path))) == 2


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"content": None, "tool_calls": None}])
def test_empty_chunks_may_follow_a_report(delta: dict[str, Any]) -> None:
    with streaming([ENDED, choice(delta), {"choices": [], "usage": {}}]) as client:
        assert len(list(list_of(client, "chat"))) == 3


def list_of(client: CircuitBreakers, path: str) -> Iterator[Any]:
    """A stream of one of the three services."""
    if path == "chat":
        return iter(client.chat.completions.create(**CHAT, stream=True))
    if path == "completions":
        return iter(client.completions.create(model="m", prompt="hi", stream=True))
    return iter(client.responses.create(model="m", input="hi", stream=True))


def streaming(events: list[dict[str, Any]], **arguments: Any) -> CircuitBreakers:
    """A client of a server that has a breaker, and streams these."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"object": "breaker", "digest": "d"})
        sent = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=sent, headers={"Content-Type": "text/event-stream"})

    return client_on(answer, **arguments)


def client_on(
    answer: Callable[[httpx.Request], httpx.Response], **arguments: Any
) -> CircuitBreakers:
    http = httpx.Client(transport=httpx.MockTransport(answer))
    return CircuitBreakers(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=http, **arguments
    )


def test_the_breaker_is_looked_for(unguarded: Unguarded) -> None:
    client = client_of(unguarded)
    with pytest.raises(UnguardedError):
        client.breaker.retrieve()
    client.close()


def test_what_is_not_generated_passes(unguarded: Unguarded) -> None:
    client = client_of(unguarded)
    assert client.embeddings.create(model="m", input="hi", encoding_format="float").data == []
    assert client.moderations.create(model="m", input="hi").model == "m"
    assert client.responses.input_tokens.count(model="m", input="hi") is not None
    assert client.models.list().data == []
    client.close()


def test_an_unguarded_answer_can_be_asked_for(unguarded: Unguarded) -> None:
    client = client_of(unguarded, require_guard=False)
    answer = client.chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "hi"
    assert guard_of(answer) is None
    stream = client.chat.completions.create(**CHAT, stream=True)
    assert [chunk.choices[0].delta.content for chunk in stream] == ["hi"]
    assert guard_of(stream) is None
    assert "/v1/breaker" not in unguarded.asked
    strict = client.with_options(require_guard=True)
    with pytest.raises(UnguardedError):
        strict.chat.completions.create(**CHAT)
    client.close()


def test_the_asynchronous_client_fails_closed_too(unguarded: Unguarded) -> None:
    async def run() -> None:
        async with AsyncCircuitBreakers(
            base_url=unguarded.url, api_key="none", max_retries=0
        ) as client:
            with pytest.raises(UnguardedError):
                await client.chat.completions.create(**CHAT)
            with pytest.raises(UnguardedError):
                await client.chat.completions.create(**CHAT, stream=True)
            client._has_breaker = True
            stream = await client.chat.completions.create(
                **CHAT | {"model": "says-done"}, stream=True
            )
            with pytest.raises(UnguardedError):
                async for _ in stream:
                    pass

    asyncio.run(run())
