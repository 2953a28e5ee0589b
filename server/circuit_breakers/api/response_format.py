"""OpenAI's responses: a stopped one is "incomplete", for the reason "content_filter".

vLLM ends every response with `response.completed`, whatever ended it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from circuit_breakers.api.annotations import ReportSource
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.formats import FormatCall, named_event, parse_event
from circuit_breakers.metrics import was_stopped

__all__ = ["ResponseFormat"]

_COMPLETED = "event: response.completed\n"
_INCOMPLETE = "event: response.incomplete\n"
_ERROR = "event: error\n"
_ITEM_DONE = "event: response.output_item.done\n"

_ENGINE_FIELDS = (
    "ec_transfer_params",
    "input_messages",
    "kv_transfer_params",
    "metrics",
    "output_messages",
)
"""Fields of vLLM's response that say nothing here."""


class ResponseFormat:
    """The answers of /v1/responses."""

    def is_end(self, event: str) -> bool:
        return event.startswith((_COMPLETED, _INCOMPLETE))

    def is_error(self, event: str) -> bool:
        return event.startswith(_ERROR)

    def error_in(self, event: str) -> ApiError | None:
        return None

    def error_event(self, error: ApiError, num_events: int) -> str:
        body = error.to_json()["error"]
        return named_event(
            "error",
            {
                "type": "error",
                "code": body["code"],
                "message": body["message"],
                "param": body["param"],
                "sequence_number": num_events,
                "error": body,
            },
        )

    def whole(
        self, body: dict[str, Any], reports: ReportSource, call: FormatCall
    ) -> dict[str, Any]:
        for name in _ENGINE_FIELDS:
            body.pop(name, None)
        call.final_usage = body.get("usage")
        report = reports.report_for(0)
        body["guard"] = report.to_json() if report else None
        if report is not None and was_stopped(report):
            body["status"] = "incomplete"
            body["incomplete_details"] = {"reason": "content_filter"}
            if body["output"]:
                _cut_short(body["output"][-1])
        for annotator in call.annotators:
            annotator.on_body(body, reports)
        return body

    async def stream(
        self, events: AsyncIterator[str], reports: ReportSource, call: FormatCall
    ) -> AsyncGenerator[str, None]:
        async for event in events:
            if event.startswith(_COMPLETED):
                yield self._last(parse_event(event), reports, call)
            elif event.startswith(_ITEM_DONE) and _is_stopped(reports):
                # Only the item that was under way is closed after the stop.
                body = parse_event(event)
                _cut_short(body["item"])
                yield named_event(body["type"], body)
            else:
                yield event

    def _last(self, body: dict[str, Any], reports: ReportSource, call: FormatCall) -> str:
        response = self.whole(body["response"], reports, call)
        # vLLM calls one that ran out of tokens complete, too.
        if response["status"] == "incomplete":
            body["type"] = "response.incomplete"
        return named_event(body["type"], body)


def _is_stopped(reports: ReportSource) -> bool:
    report = reports.report_for(0)
    return report is not None and was_stopped(report)


def _cut_short(item: dict[str, Any]) -> None:
    # Nobody should run a call whose arguments broke off.
    if "status" in item:
        item["status"] = "incomplete"
