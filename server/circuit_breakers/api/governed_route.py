"""A route whose requests are governed: they take a place, and have a time for body and answer.

Wrapped around the whole of a request, the last byte of its answer included, so that a place is
given back on every path, and no handler can forget a limit.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import cast

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from circuit_breakers.api.access import authenticate
from circuit_breakers.api.admission import Ticket
from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.service import Service
from circuit_breakers.metrics import Refusal

__all__ = ["GovernedRoute", "govern", "ticket_of"]

_TICKET = "circuit_breakers.ticket"
_LAST_WORD_S = 1.0
"""Time for the error event of a client that may not be reading."""
_NAMED_EVENTS = {
    "/v1/responses": ENDPOINTS["response"].format,
    "/v1/messages": ENDPOINTS["message"].format,
}
"""Formats whose events say their type, by path."""
_REFUSALS_BY_STATUS: dict[int, Refusal] = {408: "body_timeout", 413: "request_too_large"}


def ticket_of(request: Request) -> Ticket:
    """The place of a request on a governed route; its handler awaits `start` before it answers."""
    ticket: Ticket = request.scope[_TICKET]
    return ticket


class GovernedRoute(APIRoute):
    """Every route of ours that generates is one."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in self.methods:
            service: Service = scope["app"].state.service
            await govern(super().handle, service, scope, receive, send)
        else:
            await super().handle(scope, receive, send)


async def govern(
    handle: ASGIApp, service: Service, scope: Scope, receive: Receive, send: Send
) -> None:
    """Runs `handle`, which awaits the start of its ticket, on one request.

    Args:
        handle: answers its own errors.
    Raises:
        ApiError: there is no place for it, or its time was over before an answer began.
    """
    answer = _Answer(send, service)
    try:
        caller = authenticate(Request(scope))
        limits = service.limits.of_key(caller.limits)
        async with service.admission.admit(caller.key_id, limits) as ticket:
            scope[_TICKET] = answer.ticket = ticket
            body = _Body(receive, service.settings.body_timeout_s)
            await handle(scope, body.receive, answer.send)
    # The handler's own have been answered inside; this one is of the admission.
    except ApiError as error:
        service.load_metrics.record_refusal(cast(Refusal, error.code))
        if not answer.has_started:
            raise
        await answer.break_off(error, scope["path"])


class _Body:
    """What a client sends, within its time."""

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._is_whole = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            ApiError: 408, the body took too long.
        """
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError as e:
            raise ApiError(
                408,
                f"the body did not come in within {self._timeout_s:g} s; send it faster, or raise "
                "--body-timeout-s on the server",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from e
        self._is_whole = not message.get("more_body", False)
        return message


class _Answer:
    """What a handler answers, on its way out."""

    def __init__(self, send: Send, service: Service) -> None:
        self._send = send
        self._service = service
        self.ticket: Ticket | None = None
        self.has_started = False
        self._is_stream = False
        self._is_over = False
        self._num_events = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = self._start(message)
        else:
            self._num_events += 1
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    def _start(self, message: Message) -> Message:
        assert self.ticket is not None, "a handler runs with a ticket"
        status: int = message["status"]
        # Fail closed: an answer without a slot means that the handler is not governed.
        assert self.ticket.is_running or status >= 400, "await ticket_of(request).start() first"
        if (refusal := _REFUSALS_BY_STATUS.get(status)) is not None:
            self._service.load_metrics.record_refusal(refusal)
        self.has_started = True
        headers = list(message.get("headers", ()))
        self._is_stream = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
        headers += [(k.encode(), v.encode()) for k, v in self.ticket.headers.items()]
        return {**message, "headers": headers}

    async def break_off(self, error: ApiError, path: str) -> None:
        """Ends a stream with an error event and no [DONE]; cuts anything else off visibly."""
        if not self._is_stream or self._is_over:
            return  # uvicorn closes the connection within the announced length
        if (named := _NAMED_EVENTS.get(path)) is not None:
            event = named.error_event(error, self._num_events)
        else:
            event = f"data: {json.dumps(error.to_json(), separators=(',', ':'))}\n\n"
        last = {"type": "http.response.body", "body": event.encode(), "more_body": False}
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_S):
                await self._send(last)
