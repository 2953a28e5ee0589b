"""The two completion routes: one request, from its body to its answer, under the guard.

    body -> fields -> vLLM's serving class -> GuardedEngine
                                                   |
    answer <- guard reports <- verdict on the prompt

The verdict on the prompt comes before the first byte of the answer, so that a tripped prompt is a
plain HTTP 400 even where a stream was asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from circuit_breakers.api.accounting import RequestRecord
from circuit_breakers.api.body import read_json_object
from circuit_breakers.api.errors import ApiError, prompt_tripped
from circuit_breakers.api.governed_route import ticket_of
from circuit_breakers.api.responses import DONE, add_guard, event_error, guard_stream, is_error
from circuit_breakers.api.service import service_of
from circuit_breakers.engine.guarded import GuardSession, guard_session

if TYPE_CHECKING:
    from circuit_breakers.api.admission import Ticket
    from circuit_breakers.api.serving import Call, Endpoint, Serving

__all__ = ["complete"]

_CLIENT_CLOSED_REQUEST = 499
"""Nobody receives it; it only tells the access log."""

T = TypeVar("T")


class _ClientGoneError(Exception):
    """The client went away before there was an answer."""


async def complete(endpoint: Endpoint, request: Request) -> Response:
    """The answer to one completion request.

    Raises:
        ApiError: nothing of an answer was sent.
    """
    service = service_of(request)
    record = service.new_record()
    try:
        serving = service.serving()
        data = await read_json_object(request, service.settings.max_body_bytes)
        call = serving.parse(endpoint, data, max_choices=service.settings.max_choices)
        record.request_id, record.model = call.shape.id, call.shape.model
        with guard_session() as session:
            record.session = session
            opened = await _unless_gone(request, _open(serving, call, session, ticket_of(request)))
    except ApiError as error:
        record.fail(error)
        error.headers["X-Request-Id"] = record.request_id
        raise
    except (_ClientGoneError, ClientDisconnect):
        record.finish("aborted")
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except BaseException:
        record.finish("error")
        raise
    if isinstance(opened, _OpenStream):
        return _EventResponse(_Delivery(opened, call, session, record))
    record.complete(call.usage())
    return JSONResponse(opened, headers={"X-Request-Id": record.request_id})


class _OpenStream:
    """A stream whose prompts have all passed."""

    def __init__(self, first: list[str], rest: AsyncGenerator[str, None]) -> None:
        self.first = first
        """Events that came while prompts were still judged."""
        self.rest = rest

    async def events(self) -> AsyncIterator[str]:
        for event in self.first:
            yield event
        async for event in self.rest:
            yield event


async def _open(
    serving: Serving, call: Call, session: GuardSession, ticket: Ticket
) -> dict[str, Any] | _OpenStream:
    """A whole response, or a stream as soon as the verdict on every prompt is known.

    Raises:
        ApiError: 400 content_filter for a prompt that tripped, or what went wrong before an answer.
    """
    await ticket.start()
    result = await serving.start(call)
    if isinstance(result, dict):
        _refuse_tripped_prompt(call, session)
        return add_guard(result, session)
    first: list[str] = []
    unjudged = set(range(call.num_prompts))
    try:
        async for event in result:
            _refuse_tripped_prompt(call, session)
            if (error := event_error(event)) is not None:
                raise error
            first.append(event)
            if event == DONE:
                break
            # A choice that says something has a prompt that passed.
            choices = json.loads(event.removeprefix("data: "))["choices"]
            unjudged -= {call.prompt_of(choice["index"]) for choice in choices}
            if not unjudged:
                break
    except BaseException:
        await result.aclose()
        raise
    return _OpenStream(first, result)


def _refuse_tripped_prompt(call: Call, session: GuardSession) -> None:
    if (report := session.prompt_tripped) is not None:
        raise prompt_tripped(report, param=call.prompt_field)


class _Delivery:
    """A stream on its way to the client, and its entry in the metrics."""

    def __init__(
        self, opened: _OpenStream, call: Call, session: GuardSession, record: RequestRecord
    ) -> None:
        self._rest = opened.rest
        self._call = call
        self._record = record
        self.request_id = record.request_id
        self._events = guard_stream(opened.events(), session, call.shape)

    async def events(self) -> AsyncIterator[str]:
        async for event in self._events:
            # Written before the client can know that the stream has ended.
            if is_error(event):
                self._record.finish("error")
            elif event == DONE:
                self._record.complete(self._call.usage())
            yield event

    def fail(self) -> None:
        """Counts a stream that the server broke off."""
        self._record.finish("error")

    async def close(self) -> None:
        """Aborts what is still being generated; after the end it changes nothing."""
        self._record.finish("aborted")
        await self._events.aclose()
        await self._rest.aclose()


class _EventResponse(StreamingResponse):
    """Server-sent events that are always closed, also when the client goes away."""

    def __init__(self, delivery: _Delivery) -> None:
        super().__init__(
            delivery.events(),
            media_type="text/event-stream",
            # A proxy that collects the stream would hide the first tokens.
            headers={
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": delivery.request_id,
            },
        )
        self._delivery = delivery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            # A limit ended it; a client that goes away ends it without an exception.
            self._delivery.fail()
            raise
        finally:
            await self._delivery.close()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, or the end of it when the client goes away first.

    The body must have been read: the next message can only be the disconnect.

    Raises:
        _ClientGoneError: `work` was cancelled.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _ClientGoneError
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
