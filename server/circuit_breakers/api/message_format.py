"""Anthropic's messages: a stopped one has the stop reason "refusal".

vLLM has no word for it: it gives no stop reason, or "end_turn" when nothing was said.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from circuit_breakers.api.annotations import ReportSource
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.formats import FormatCall, named_event, parse_event
from circuit_breakers.metrics import was_stopped

__all__ = ["MessageFormat"]

_DELTA = "event: message_delta\n"
_ERROR = "event: error\n"
_STOP = "event: message_stop\n"

_ENGINE_FIELDS = ("ec_transfer_params", "kv_transfer_params")
"""Fields of vLLM's message that say nothing here."""


class MessageFormat:
    """The answers of /v1/messages."""

    def is_end(self, event: str) -> bool:
        return event.startswith(_STOP)

    def is_error(self, event: str) -> bool:
        return event.startswith(_ERROR)

    def error_in(self, event: str) -> ApiError | None:
        return None

    def error_event(self, error: ApiError, num_events: int) -> str:
        return named_event("error", error.to_anthropic_json())

    def whole(
        self, body: dict[str, Any], reports: ReportSource, call: FormatCall
    ) -> dict[str, Any]:
        for name in _ENGINE_FIELDS:
            body.pop(name, None)
        body.setdefault("stop_sequence", None)
        body.setdefault("stop_reason", None)
        _add_guard(body, body, reports)
        return body

    async def stream(
        self, events: AsyncIterator[str], reports: ReportSource, call: FormatCall
    ) -> AsyncGenerator[str, None]:
        async for event in events:
            if event.startswith(_DELTA):
                body = parse_event(event)
                _add_guard(body, body["delta"], reports)
                yield named_event(body["type"], body)
            else:
                yield event


def _add_guard(body: dict[str, Any], end: dict[str, Any], reports: ReportSource) -> None:
    report = reports.report_for(0)
    body["guard"] = report.to_json() if report else None
    if report is not None and was_stopped(report):
        end["stop_reason"] = "refusal"
        end["stop_sequence"] = None
