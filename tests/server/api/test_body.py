"""Bodies that are not a JSON object of text are refused, each with its reason."""

from __future__ import annotations

import pytest

from circuit_breakers.api.body import parse_json_object
from circuit_breakers.api.errors import ApiError


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "got a JSON list"),
        (b'"text"', "got a JSON str"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (rb'{"a": "\ud800"}', "lone surrogate"),
        (rb'{"a": "\uD83D x"}', "lone surrogate"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": 9223372036854775808}', "9223372036854775808 is not a 64-bit integer"),
        (b'{"a": [-9223372036854775809]}', "is not a 64-bit integer"),
        (b'{"a": [-1e999]}', "-1e999 is beyond a 64-bit float"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
        (rb'{"model": 1, "mod\u0065l": 2}', "the key 'model' is there twice"),
        (b'{"a": [{"b": {"c": 1, "d": 2, "d": 3}}]}', "the key 'd' is there twice"),
    ],
)
def test_refuses_with_400_and_the_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        parse_json_object(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_keeps_text_beyond_the_basic_plane() -> None:
    raw = rb'{"a": "\ud83d\ude00", "b": "' + "😀é".encode() + b'"}'
    assert parse_json_object(raw) == {"a": "😀", "b": "😀é"}


@pytest.mark.parametrize(("opening", "closing"), [('{"a":', "}"), ("[", "]")])
def test_depth_has_a_limit_that_an_answer_can_repeat(opening: str, closing: str) -> None:
    """pydantic gives up at 255 levels: vLLM could not write the tools of a response back."""

    def body(depth: int) -> bytes:
        inner = opening * (depth - 1) + "1" + closing * (depth - 1)
        return f'{{"wide": {[[]] * 200}, "deep": {inner}}}'.encode()

    parse_json_object(body(128))
    with pytest.raises(ApiError, match="nested too deeply, expected at most 128 levels"):
        parse_json_object(body(129))
