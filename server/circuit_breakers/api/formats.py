"""How each route's format says what the guard found: whole answers, streams, errors.

    chat, completion   finish_reason "content_filter"            api/responses.py
    response           status "incomplete", reason               api/response_format.py
    message            stop_reason "refusal"                     api/message_format.py

A stream is a series of server-sent events, as text. Only events that end something are rewritten.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from circuit_breakers.api.annotations import Annotator, ReportSource
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.responses import (
    DONE,
    StreamShape,
    add_guard,
    event_error,
    guard_stream,
    is_error,
)

__all__ = ["ChoicesFormat", "Format", "FormatCall", "named_event", "parse_event"]


class FormatCall(Protocol):
    """What a format needs to know of the request."""

    shape: StreamShape
    annotators: tuple[Annotator, ...]
    final_usage: dict[str, Any] | None
    """What the last event of a response says was read and written."""


class Format(Protocol):
    """One format of answers."""

    def is_end(self, event: str) -> bool:
        """Whether an event is the last one of a complete answer."""
        ...

    def is_error(self, event: str) -> bool:
        """Whether an event of vLLM's says that the stream broke off."""
        ...

    def error_in(self, event: str) -> ApiError | None:
        """What such an event says; None where it only tells of vLLM's trouble with an error."""
        ...

    def error_event(self, error: ApiError, num_events: int) -> str:
        """The event that breaks a stream off after `num_events` others."""
        ...

    def whole(
        self, body: dict[str, Any], reports: ReportSource, call: FormatCall
    ) -> dict[str, Any]:
        """A whole answer of vLLM's with what the guard found."""
        ...

    def stream(
        self, events: AsyncIterator[str], reports: ReportSource, call: FormatCall
    ) -> AsyncGenerator[str, None]:
        """A stream of vLLM's with what the guard found."""
        ...


class ChoicesFormat:
    """Chat completions and completions."""

    def is_end(self, event: str) -> bool:
        return event == DONE

    def is_error(self, event: str) -> bool:
        return is_error(event)

    def error_in(self, event: str) -> ApiError | None:
        return event_error(event)

    def error_event(self, error: ApiError, num_events: int) -> str:
        return f"data: {json.dumps(error.to_json())}\n\n{DONE}"

    def whole(
        self, body: dict[str, Any], reports: ReportSource, call: FormatCall
    ) -> dict[str, Any]:
        return add_guard(body, reports, call.annotators)

    def stream(
        self, events: AsyncIterator[str], reports: ReportSource, call: FormatCall
    ) -> AsyncGenerator[str, None]:
        return guard_stream(events, reports, call.shape, call.annotators)


def named_event(name: str, body: dict[str, Any]) -> str:
    """A server-sent event that says its type, as OpenAI's responses and Anthropic's messages do."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {data}\n\n"


def parse_event(event: str) -> dict[str, Any]:
    """The data of a server-sent event with a type."""
    _, _, data = event.partition("\ndata: ")
    parsed: dict[str, Any] = json.loads(data)
    return parsed
