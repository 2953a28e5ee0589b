"""From the bytes of a request to a JSON object, within a size limit."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import Request

from circuit_breakers.api.errors import ApiError

__all__ = ["parse_json_object", "read_body", "read_json_object"]

_GONE = object()
_MAX_DEPTH = 128
"""Objects and lists within one another: more than any schema has, and half of what pydantic writes
into an answer that repeats it."""


async def read_json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        ApiError: 415 not JSON by its content type, 413 too large, 400 not a JSON object.
    """
    media_type = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    # A browser sends other types across origins without asking first.
    if media_type != "application/json":
        raise ApiError(
            415,
            f"got content type {media_type!r}, expected 'application/json'; set the header",
            code="unsupported_media_type",
        )
    return parse_json_object(await read_body(request, max_bytes))


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """`raw` as a JSON object whose keys are there once and whose strings are valid Unicode.

    Raises:
        ApiError: 400, saying where it goes wrong.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _invalid(f"the body is not UTF-8: {e.reason} at byte {e.start}") from e
    try:
        value = json.loads(text, **_STRICT)
        if "\\ud" in text or "\\uD" in text:
            # "\ud800" alone is valid JSON and no text; a tokenizer would fail on it.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise _invalid("the body has a lone surrogate escape; send whole characters") from e
    except RecursionError as e:
        raise _nested_too_deeply() from e
    except ValueError as e:
        raise _invalid(f"the body is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise _invalid(f"got a JSON {type(value).__name__}, expected an object")
    # Hardly any body has so many brackets that its depth has to be looked at.
    if text.count("{") + text.count("[") > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
        raise _nested_too_deeply()
    return value


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The request's body as it came.

    Raises:
        ApiError: 413, it is too large.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _depth(value: dict[str, Any]) -> int:
    """Objects and lists within one another, itself included."""
    depth = 0
    level: list[Any] = [value]
    while level:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    # Which one counts is up to the reader; a filter in front may have read the other.
    if len(value) != len(pairs):
        # Taken out once each, the keys that are left were there before.
        twice = next(name for name, _ in pairs if value.pop(name, _GONE) is _GONE)
        raise _invalid(f"the key {twice[:64]!r} is there twice; send it once")
    return value


def _parse_int(digits: str) -> int:
    value = int(digits)
    # vLLM would take it in, and fail on it only after it has made room for the request.
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits[:24]} is not a 64-bit integer")
    return value


def _parse_float(digits: str) -> float:
    value = float(digits)
    # No answer that repeats it would be JSON.
    if not math.isfinite(value):
        raise ValueError(f"{digits[:24]} is beyond a 64-bit float")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_constant": _refuse_constant,
    "parse_float": _parse_float,
    "parse_int": _parse_int,
}


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _nested_too_deeply() -> ApiError:
    return _invalid(
        f"the body is nested too deeply, expected at most {_MAX_DEPTH} levels; send a flatter one"
    )


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {max_bytes} bytes; send a shorter one, or raise "
        "--max-body-bytes on the server",
        code="request_too_large",
    )
