"""Puts the guard report into what vLLM's serving classes answer: whole responses and streams.

A stream is a series of server-sent events. Only the chunk that ends a choice is rewritten; all
others pass as they are, untouched and unparsed.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from circuit_breakers.api.annotations import Annotator, ReportSource
from circuit_breakers.api.errors import ApiError, from_vllm_error
from circuit_breakers.guard.decision import GuardReport
from circuit_breakers.metrics import was_stopped

__all__ = [
    "DONE",
    "StreamShape",
    "add_guard",
    "data_event",
    "event_error",
    "guard_stream",
    "is_error",
    "summary",
]

DONE = "data: [DONE]\n\n"

# vLLM writes compact JSON, and inside a JSON string the quotes would be escaped.
_FINISH_MARK = '"finish_reason":"'
_USAGE_MARK = '"choices":[]'
_ERROR_START = 'data: {"error"'

_ENGINE_FIELDS = ("kv_transfer_params", "ec_transfer_params", "prompt_logprobs", "metrics")
"""Fields of vLLM's responses that say nothing here."""


def summary(reports: Iterable[GuardReport]) -> GuardReport | None:
    """The report that stands for the whole response: the first trip, else the closest to one."""
    closest: GuardReport | None = None
    closest_margin = float("-inf")
    for report in reports:
        if report.tripped:
            return report
        margin = float("-inf")
        if report.score is not None and report.threshold is not None:
            margin = report.score - report.threshold
        if closest is None or margin > closest_margin:
            closest, closest_margin = report, margin
    return closest


def add_guard(
    body: dict[str, Any], reports: ReportSource, annotators: Sequence[Annotator] = ()
) -> dict[str, Any]:
    """A whole response with a `guard` of its own and one for each choice."""
    seen = []
    for choice in body["choices"]:
        _guard_choice(choice, report := reports.report_for(choice["index"]))
        if report is not None:
            seen.append(report)
    for name in _ENGINE_FIELDS:
        body.pop(name, None)
    worst = summary(seen)
    body["guard"] = worst.to_json() if worst else None
    for annotator in annotators:
        annotator.on_body(body, reports)
    return body


def _guard_choice(choice: dict[str, Any], report: GuardReport | None) -> None:
    choice["guard"] = report.to_json() if report else None
    # vLLM says tool_calls when it could parse some before the trip.
    if report is not None and was_stopped(report):
        choice["finish_reason"] = "content_filter"


def event_error(event: str) -> ApiError | None:
    """The error that an event carries; None for every other event."""
    return from_vllm_error(_parse(event)["error"]) if is_error(event) else None


def is_error(event: str) -> bool:
    """Whether an event says that the stream broke off."""
    return event.startswith(_ERROR_START)


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """What is known of a stream before it starts."""

    id: str
    object: str
    """text_completion or chat.completion.chunk."""
    model: str
    num_choices: int

    def chunk(self, **fields: Any) -> dict[str, Any]:
        """A chunk of this stream; without a choice unless `fields` has one."""
        return {
            "id": self.id,
            "object": self.object,
            "created": int(time.time()),
            "model": self.model,
            "choices": [],
        } | fields

    def last_chunk(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The chunk that ends a choice which has nothing more to say."""
        empty: dict[str, Any] = (
            {"delta": {}} if self.object == "chat.completion.chunk" else {"text": ""}
        )
        choice = {"index": index, **empty, "logprobs": None, "finish_reason": finish_reason}
        return self.chunk(choices=[choice])


async def guard_stream(
    events: AsyncIterator[str],
    reports: ReportSource,
    shape: StreamShape,
    annotators: Sequence[Annotator] = (),
) -> AsyncGenerator[str, None]:
    """The events of a stream, with a `guard` in the last chunk of each choice.

    vLLM drops the last chunk of a choice that delivered no token, as when its first one trips;
    such chunks are written here, before the usage chunk and [DONE].
    """
    open_choices = set(range(shape.num_choices))
    is_first, has_ended = bool(annotators), False
    watched = any(annotator.watches for annotator in annotators)
    async for event in events:
        error = event_error(event)
        if error is not None:
            # The choices did not end, they broke off.
            open_choices.clear()
            has_ended = True
            yield data_event(error.to_json())
            continue
        if event == DONE or _USAGE_MARK in event:
            for index in sorted(open_choices):
                chunk = shape.last_chunk(index, reports.finish_reason_for(index) or "stop")
                yield _chunk(chunk, reports, annotators, is_first)
                is_first = False
            open_choices.clear()
            for annotator in () if has_ended else annotators:
                for fields in annotator.last_chunks(reports):
                    yield data_event(shape.chunk(**fields))
            has_ended = True
        elif is_first or watched or _FINISH_MARK in event:
            chunk = _parse(event)
            for choice in chunk["choices"]:
                if choice.get("finish_reason") is not None:
                    open_choices.discard(choice["index"])
            yield _chunk(chunk, reports, annotators, is_first)
            is_first = False
            continue
        yield event


def _chunk(
    chunk: dict[str, Any],
    reports: ReportSource,
    annotators: Sequence[Annotator],
    is_first: bool,
) -> str:
    """An event, with a `guard` where the chunk ends a choice."""
    ended = [choice for choice in chunk["choices"] if choice.get("finish_reason") is not None]
    if ended:
        add_guard(chunk, reports)
    for annotator in annotators:
        if is_first or ended or annotator.watches:
            annotator.on_chunk(chunk, reports, is_first=is_first)
    return data_event(chunk)


def _parse(event: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return parsed


def data_event(body: dict[str, Any]) -> str:
    """A server-sent event without a type, as chat completions and completions have."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
