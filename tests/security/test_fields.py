"""No field of a request gets a word past the breaker: it is refused, or the answer stops.

The answer trips on " Paris" (breaker_for_words.py).
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ..server.api.capitals import BEFORE_PARIS, FRANCE
from ..server.api.conftest import MAX_MODEL_LEN, MODEL, Server, user
from .asking import COMPLETIONS, PREFILL, ids_of, post, said
from .wire import CHAT, TRIP

EMBEDS = base64.b64encode(b"\x80\x02" + b"\0" * 256).decode()
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


REFUSED_ANYWHERE: dict[str, Any] = {
    "prompt_embeds": EMBEDS,
    "prompt_logprobs": 5,
    "use_beam_search": True,
    "best_of": 2,
    "length_penalty": 2.0,
    "cache_salt": "salt",
    "vllm_xargs": {"guard": "off"},
    "extra_args": {"guard": "off"},
    "kv_transfer_params": {"do_remote_decode": True},
    "ec_transfer_params": {},
    "priority": -1,
    "request_id": "mine",
    "session_id": "mine",
    "stop_token_ids": [1],
    "include_stop_str_in_output": True,
    "truncate_prompt_tokens": 1,
    "truncation_side": "left",
    "repetition_detection": {"max_pattern_size": 1},
    "stream_interval": 1000,
    "mm_processor_kwargs": {"a": 1},
    "logits_processors": ["a.b"],
    "guided_json": {},
    "lora_request": {"lora_name": "a", "lora_int_id": 1, "lora_path": "/tmp"},
    "mode": "observe",
    "policy": "none",
    "guard": {"mode": "observe"},
    "threshold": 1e9,
    "messages\0": user("a zebra"),
    "Messages": user("a zebra"),
    " prompt": "a zebra",
    "extra_body": {"prompt_embeds": EMBEDS},
}
_NOT_SERVED = ("unknown_parameter", "unsupported_parameter")
REFUSED_CHAT: dict[str, Any] = {
    "echo": True,
    "prompt": "a zebra",
    "chat_template": "{{ 'a zebra' }}",
    "chat_template_kwargs": {"chat_template": "x"},
    "media_io_kwargs": {"image": {}},
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["audio"],
    "prediction": {"type": "content", "content": "a zebra"},
    "web_search_options": {},
}
REFUSED_COMPLETION: dict[str, Any] = {
    "messages": user("a zebra"),
    "input": "a zebra",
    "add_special_tokens": False,
    "prompt_token_ids": [1, 2],
}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        *((CHAT, k, v) for k, v in (REFUSED_ANYWHERE | REFUSED_CHAT).items()),
        *((COMPLETIONS, k, v) for k, v in (REFUSED_ANYWHERE | REFUSED_COMPLETION).items()),
    ],
)
def test_a_field_that_could_get_around_is_refused(
    server: Server, path: str, name: str, value: Any
) -> None:
    prompt = {"messages": user("hi")} if path == CHAT else {"prompt": "hi"}
    response = post(server, path, {**prompt, "max_tokens": 1, name: value}, stream=False)
    assert response.status_code == 400
    error = response.json()["error"]
    # `guard` is a field that may tighten, and this would not.
    codes = ("policy_not_allowed",) if name == "guard" else _NOT_SERVED
    assert error["code"] in codes
    assert error["param"] == name


@pytest.mark.parametrize(
    "model",
    [
        "",
        "other",
        f"{MODEL}/",
        f"../{MODEL}",
        MODEL.upper(),
        "default",
        "base",
        "breaker",
        "/tmp",
        "*",
    ],
)
def test_another_model_is_not_served(server: Server, model: str) -> None:
    response = server.http.post(CHAT, json={**TRIP, "model": model})
    assert response.status_code in (400, 404)
    assert "choices" not in response.json()


def test_without_a_model_the_guarded_one_answers(server: Server) -> None:
    body = {name: value for name, value in TRIP.items() if name != "model"}
    response = server.http.post(CHAT, json=body)
    assert response.json()["error"]["code"] == "content_filter"


@pytest.fixture(scope="module")
def paris() -> int:
    (token_id,) = ids_of(" Paris")
    return token_id


def generating(paris: int) -> dict[str, dict[str, Any]]:
    schema = {"type": "object", "properties": {"a": {"enum": ["in Paris"]}}, "required": ["a"]}
    return {
        "plain": {},
        "forced length": {"min_tokens": 16, "ignore_eos": True},
        "never an end": {"logit_bias": {"2": -100, "0": -100}, "ignore_eos": True},
        "bias towards it": {"logit_bias": {str(paris): 100}},
        "that token only": {"allowed_token_ids": [paris]},
        "its logprob": {"logprobs": True, "top_logprobs": 5},
        "its ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True},
        "stop at it": {"stop": [" Paris"]},
        "stop behind it": {"stop": ["."]},
        "stop before it": {"stop": [" is"]},
        "special tokens": {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        "several choices": {"n": 3, "temperature": 0.2},
        "a regular expression": {"structured_outputs": {"regex": "It is Paris"}},
        "a choice": {"structured_outputs": {"choice": ["It is Paris"]}},
        "a schema": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": schema, "strict": True},
            }
        },
        "sampling": {"temperature": 1.5, "top_k": 2, "top_p": 0.99, "min_p": 0.0},
        "penalties": {"frequency_penalty": -2, "presence_penalty": -2, "repetition_penalty": 0.5},
        "usage in every chunk": {
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}
        },
        "tools": {"tools": [TOOL], "tool_choice": "auto"},
    }


def check_nothing_leaked(response: Any, paris: int) -> None:
    """Passes for a refusal, and for an answer without the word in any of its shapes."""
    assert response.status_code in (200, 400)
    text = response.text
    events = [text] if text.startswith("{") else text.split("\n\n")
    bodies = [json.loads(e.removeprefix("data: ")) for e in events if e and "[DONE]" not in e]
    for choice in (choice for body in bodies for choice in body.get("choices", ())):
        assert paris not in (choice.get("token_ids") or ())
        # What else could have stood in the place of a token that passed is no answer: to go on
        # from there, it would have to come back as a prompt.
        drop_alternatives(choice)
    said = json.dumps(bodies)
    assert " Paris" not in said
    assert f"token_id:{paris}" not in said


def drop_alternatives(choice: dict[str, Any]) -> None:
    logprobs = choice.get("logprobs") or {}
    logprobs.pop("top_logprobs", None)
    for entry in logprobs.get("content") or ():
        entry.pop("top_logprobs", None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", generating(0).keys())
def test_no_parameter_gets_the_word_out(
    server: Server, paris: int, case: str, stream: bool
) -> None:
    fields = generating(paris)[case]
    if not stream:
        fields.pop("stream_options", None)
    body = {"messages": user(FRANCE), "max_tokens": 16, **fields}
    check_nothing_leaked(post(server, CHAT, body, stream=stream), paris)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"logprobs": 5},
        {"suffix": " Paris"},
        {"n": 3},
        {"stop": [" Paris", " "]},
        {"max_tokens": 1, "logprobs": 20},
        {"max_tokens": MAX_MODEL_LEN - 10},
    ],
    ids=str,
)
def test_no_parameter_of_a_completion_gets_the_word_out(
    server: Server, paris: int, fields: dict[str, Any], stream: bool
) -> None:
    body = {"prompt": BEFORE_PARIS, "max_tokens": 6, **fields}
    response = post(server, COMPLETIONS, body, stream=stream)
    check_nothing_leaked(response, paris)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_one_token_at_a_time_gets_no_further(server: Server, paris: int, route: str) -> None:
    text = "The capital of"
    for _ in range(8):
        if route == CHAT:
            messages = [*user(FRANCE), said("assistant", text)]
            body: dict[str, Any] = {"messages": messages, **PREFILL}
        else:
            body = {"prompt": text}
        response = post(server, route, {**body, "max_tokens": 1}, stream=False)
        check_nothing_leaked(response, paris)
        if response.status_code == 400:
            break
        choice = response.json()["choices"][0]
        piece = choice["text"] if route == COMPLETIONS else choice["message"]["content"]
        if not piece:
            break
        text += piece
    assert "Paris" not in text
