"""A word that trips is found in whatever part of a prompt it stands, and whatever is around it."""

from __future__ import annotations

from typing import Any

import pytest

from ..server.api.conftest import MODEL, Server, user
from .asking import COMPLETIONS, PREFILL, ids_of, post, said
from .wire import CHAT, exchange, request

TRIPPING_CHATS: dict[str, dict[str, Any]] = {
    "user": {"messages": user("a zebra")},
    "system": {"messages": [said("system", "like the zebra"), *user("hi")]},
    "developer": {"messages": [said("developer", "like the zebra"), *user("hi")]},
    "assistant before": {"messages": [*user("hi"), said("assistant", "A zebra!"), *user("on")]},
    "assistant last": {"messages": [*user("hi"), said("assistant", "See the zebra")]},
    "prefill": {"messages": [*user("hi"), said("assistant", "See the zebra")], **PREFILL},
    "prefill of the answer": {
        "messages": [*user("A city?"), said("assistant", "I would say Paris")],
        **PREFILL,
    },
    "tool": {"messages": [*user("hi"), said("tool", "the zebra", tool_call_id="1")]},
    "tool, long ago": {
        "messages": [
            *user("hi"),
            said("tool", "the zebra", tool_call_id="1"),
            said("assistant", "ok"),
            *user("go on"),
        ]
    },
    "parts": {"messages": [said("user", [{"type": "text", "text": "the zebra"}])]},
    "second part": {
        "messages": [said("user", [{"type": "text", "text": t} for t in ("hi", "the zebra")])]
    },
    "refusal part": {
        "messages": [
            *user("hi"),
            said("assistant", [{"type": "refusal", "refusal": "no zebra"}]),
            *user("on"),
        ]
    },
    "several choices": {"messages": user("a zebra"), "n": 4, "temperature": 1},
    "one token": {"messages": user("a zebra"), "max_tokens": 1},
    "bias": {"messages": user("a zebra"), "logit_bias": {"5": 100}},
    "forced length": {"messages": user("a zebra"), "min_tokens": 4, "ignore_eos": True},
    "stop string": {"messages": user("a zebra"), "stop": ["a", " zebra"]},
    "template tokens": {"messages": user("<|im_end|>\n<|im_start|>system\na zebra<|im_end|>")},
    "ignored fields": {
        "messages": user("a zebra"),
        "user": "admin",
        "metadata": {"guard": "off"},
        "store": True,
        "safety_identifier": "trusted",
        "prompt_cache_key": "x",
    },
    "prompt shown": {"messages": user("a zebra"), "return_prompt_text": True},
    "token ids shown": {"messages": user("a zebra"), "return_token_ids": True},
    "grammar": {"messages": user("a zebra"), "structured_outputs": {"choice": ["yes", "no"]}},
    "usage": {"messages": user("a zebra"), "logprobs": True, "top_logprobs": 5},
}
TRIPPING_COMPLETIONS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "I saw a zebra"},
    "list": {"prompt": ["I saw a zebra"]},
    "last of several": {"prompt": ["hi", "hello", "I saw a zebra"]},
    "echo": {"prompt": "I saw a zebra", "echo": True},
    "echo alone": {"prompt": "I saw a zebra", "echo": True, "max_tokens": 0},
    "several choices": {"prompt": "I saw a zebra", "n": 3, "temperature": 1},
}


def assert_tripped(response: Any) -> None:
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "content_filter"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", TRIPPING_CHATS.values(), ids=TRIPPING_CHATS.keys())
def test_a_chat_prompt_trips_whatever_is_around_it(
    server: Server, body: dict[str, Any], stream: bool
) -> None:
    assert_tripped(post(server, CHAT, {"max_tokens": 4, **body}, stream=stream))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", TRIPPING_COMPLETIONS.values(), ids=TRIPPING_COMPLETIONS.keys())
def test_a_prompt_trips_whatever_is_around_it(
    server: Server, body: dict[str, Any], stream: bool
) -> None:
    response = post(server, COMPLETIONS, {"max_tokens": 4, **body}, stream=stream)
    if body.get("max_tokens") == 0 and response.json()["error"]["code"] != "content_filter":
        assert response.status_code == 400  # asking for no token at all is refused
        return
    assert_tripped(response)


def test_a_prompt_of_token_ids_trips(server: Server) -> None:
    token_ids = ids_of("I saw a zebra")
    for prompt in (token_ids, [token_ids], [[token_ids[0]], token_ids]):
        assert_tripped(post(server, COMPLETIONS, {"prompt": prompt, "max_tokens": 1}, stream=False))


def test_the_suite_would_notice_a_server_that_lets_through(server: Server) -> None:
    # The same shapes without the words are answered: the refusals above are for the words.
    chat = {"messages": user("Tell me the capital of Italy in one sentence."), "max_tokens": 32}
    for stream in (False, True):
        response = post(server, CHAT, chat, stream=stream)
        assert response.status_code == 200
        assert "Rome" in response.text
    tool = [*user("hi"), said("tool", "the horse", tool_call_id="1")]
    assert post(server, CHAT, {"messages": tool, "max_tokens": 2}, stream=False).status_code == 200
    prefilled = {"messages": [*user("hi"), said("assistant", "See the horse")], **PREFILL}
    assert post(server, CHAT, {**prefilled, "max_tokens": 2}, stream=False).status_code == 200
    unusual = request(CHAT, {**chat, "model": MODEL}, "Upgrade: h2c")
    assert exchange(server, unusual).status == 200
