"""Bad input gets a clear error in OpenAI's shape, and the server lives on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import MAX_MODEL_LEN, MODEL, Server

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
JSON_HEADER = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def server_lives_on(server: Server) -> Iterator[None]:
    yield
    body = {"model": MODEL, "messages": HI, "max_tokens": 1}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("status", "code", "param", "fields"),
    [
        (404, "model_not_found", "model", {"model": "nope"}),
        (400, "invalid_value", "messages", {"messages": []}),
        (
            400,
            "invalid_value",
            "messages.0.content",
            {"messages": [{"role": "user", "content": 3}]},
        ),
        (400, "unknown_parameter", "temprature", {"temprature": 1}),
        (400, "unsupported_parameter", "use_beam_search", {"use_beam_search": True}),
        (400, "unsupported_parameter", "seed", {"seed": 1}),
        (400, "invalid_value", "temperature", {"temperature": "hot"}),
        (400, None, "temperature", {"temperature": -1}),
        (400, "invalid_value", "n", {"n": 99}),
        (400, None, "max_tokens", {"max_tokens": 0}),
        (400, None, "max_tokens", {"max_tokens": 10**6}),
        (400, "invalid_value", "stop", {"stop": ["x"] * 1000}),
        (400, "invalid_value", "tools.0", {"tools": [5]}),
        (400, None, "logit_bias", {"logit_bias": {"99999999": 1}}),
        (400, None, "logprobs", {"logprobs": True, "top_logprobs": 1000}),
        (400, None, None, {"structured_outputs": {"regex": "(("}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(
    server: Server, status: int, code: str | None, param: str | None, fields: Any, stream: bool
) -> None:
    body = {"model": MODEL, "messages": HI, "max_tokens": 2, "stream": stream} | fields
    response = server.http.post("/v1/chat/completions", json=body)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)


def test_stream_options_need_a_stream(server: Server) -> None:
    body = {"messages": HI, "stream_options": {"include_usage": True}}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "stream_options"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_told_both_lengths(
    server: Server, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "dog " * 600}], "stream": stream}
    error = error_of(server.http.post("/v1/chat/completions", json=body))
    assert error["code"] == "context_length_exceeded"
    assert f"{MAX_MODEL_LEN} tokens" in error["message"]
    assert f"{MAX_MODEL_LEN + 1} input tokens" in error["message"]


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], [""], [-1], [99999999], [1.5], [1, "a"], True, {"a": 1}]
)
def test_a_bad_prompt_is_refused(server: Server, prompt: Any) -> None:
    response = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize("raw", [b'{"messages": "\xff"}', b"{", b"", b"[]"])
def test_a_body_that_is_not_json_is_refused(server: Server, raw: bytes) -> None:
    response = server.http.post("/v1/chat/completions", content=raw, headers=JSON_HEADER)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


def test_another_content_type_is_refused(server: Server) -> None:
    response = server.http.post(
        "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415
    error_of(response)


def test_a_body_that_is_too_large_is_refused_announced_or_not(server: Server) -> None:
    mebibyte = b"a" * 2**20

    def unannounced() -> Iterator[bytes]:
        for _ in range(5):
            yield mebibyte

    for content in (mebibyte * 5, unannounced()):
        response = server.http.post("/v1/chat/completions", content=content, headers=JSON_HEADER)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"


def test_headers_of_vllm_change_nothing(server: Server) -> None:
    headers = {
        "X-Vllm-Priority": "-5",
        "X-data-parallel-rank": "7",
        "X-Request-Id": "mine",
        "X-Session-ID": "mine",
    }
    body = {"model": MODEL, "messages": HI, "max_tokens": 1}
    response = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200
    assert "mine" not in response.json()["id"]
