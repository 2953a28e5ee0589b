"""The one way in: a request of any route that generates or scores, from its body to its answer.

    body -> fields -> vLLM's serving class -> GuardedEngine
                                                   |
    answer <- guard reports <- verdict on the prompt

The verdict on the prompt comes before the first byte of the answer, so that a tripped prompt is a
plain HTTP 400 even where a stream was asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from circuit_breakers.api.access import (
    authenticate,
    blocking,
    check_model,
    require_admin_for_scores,
    take_guard_request,
    tightened_by,
)
from circuit_breakers.api.accounting import RequestRecord
from circuit_breakers.api.azure import AzureAnnotator
from circuit_breakers.api.body import read_json_object
from circuit_breakers.api.endpoints import ENDPOINTS, Endpoint
from circuit_breakers.api.errors import ApiError, stopped, unreadable_answer
from circuit_breakers.api.governed_route import ticket_of
from circuit_breakers.api.moderation import (
    ChatModeration,
    ModerationRequest,
    ResponseModeration,
    moderation_request,
)
from circuit_breakers.api.moderations import moderate
from circuit_breakers.api.service import Service, service_of
from circuit_breakers.api.token_scores import TokenScoreAnnotator
from circuit_breakers.api.trip_actions import act_on_body, act_on_prompt, act_on_stream
from circuit_breakers.engine.session import GuardSession, guard_session
from circuit_breakers.policies.served_policy import ServedPolicy

if TYPE_CHECKING:
    from circuit_breakers.api.admission import Ticket
    from circuit_breakers.api.annotations import Annotator
    from circuit_breakers.api.serving import Call, Serving

__all__ = ["complete"]

_UNAVAILABLE = 503
"""The engine died."""
_CLIENT_CLOSED_REQUEST = 499
"""Nobody receives it; it only tells the access log."""

T = TypeVar("T")


class _ClientGoneError(Exception):
    """The client went away before there was an answer."""


async def complete(endpoint: Endpoint | Literal["moderation"], request: Request) -> Response:
    """The answer to one request that generates or scores.

    Raises:
        ApiError: nothing of an answer was sent.
    """
    service = service_of(request)
    record = service.new_record(request.headers)
    record.endpoint = endpoint
    scores: TokenScoreAnnotator | None = None
    try:
        serving = service.serving()
        caller = authenticate(request)
        record.key_id = caller.key_id
        data = await read_json_object(request, service.settings.max_body_bytes)
        wanted = take_guard_request(data)
        served = tightened_by(caller, wanted)
        wants_scores = wanted is not None and wanted.token_scores
        if wants_scores:
            _check_scores(endpoint)
            require_admin_for_scores(request, caller)
        asked = moderation_request(data.get("moderation"), (serving.breaker_name,))
        if asked is not None:
            served = blocking(served, asked.blocked_phases)
        with guard_session(served.policy) as session:
            record.session = session
            if endpoint == "moderation":
                check_model(caller, serving.model_name)
                max_inputs = service.settings.max_choices
                work = _moderate(service, data, served, max_inputs, ticket_of(request))
                body = await _unless_gone(request, work)
                record.complete(None)
                return JSONResponse(body, headers={"X-Request-Id": record.request_id})
            call = serving.parse(endpoint, data, max_choices=service.settings.max_choices)
            record.request_id = call.shape.id or record.request_id
            record.model = call.shape.model
            record.choices_per_prompt = call.shape.num_choices // call.num_prompts
            check_model(caller, call.shape.model)
            call.annotators = tuple(_annotators(call, asked, serving, service, request))
            if wants_scores:
                scores = TokenScoreAnnotator(call, session, serving.tokenizer)
                call.annotators += (scores,)
            opening = _open(service, call, session, served, ticket_of(request))
            opened = await _unless_gone(request, opening)
    except ApiError as error:
        record.fail(error)
        if scores is not None and error.guard is not None:
            error.token_scores = scores.of_error(error.guard)
        await record.settle()
        error.headers["X-Request-Id"] = record.request_id
        raise
    except (_ClientGoneError, ClientDisconnect):
        record.finish("aborted")
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except BaseException:
        record.finish("error")
        raise
    if isinstance(opened, _OpenStream):
        return _EventResponse(_Delivery(opened, call, session, served, record))
    record.complete(call.usage())
    await record.settle()
    return JSONResponse(opened, headers={"X-Request-Id": record.request_id})


def _check_scores(endpoint: Endpoint | Literal["moderation"]) -> None:
    """Passes for an endpoint whose answers have a place for token scores.

    Raises:
        ApiError: 400.
    """
    if endpoint == "moderation" or not ENDPOINTS[endpoint].rules.has_token_scores:
        raise ApiError(
            400,
            "guard.token_scores is not served here, as this answer has no choices to put them in; "
            "leave it out, or ask /v1/chat/completions or /v1/completions",
            code="unsupported_parameter",
            param="guard.token_scores",
        )


def _annotators(
    call: Call,
    asked: ModerationRequest | None,
    serving: Serving,
    service: Service,
    request: Request,
) -> Iterator[Annotator]:
    """What the client asked for, and the operator, besides the guard's own report."""
    if asked is not None:
        kind = ResponseModeration if call.endpoint == "response" else ChatModeration
        yield kind(serving.breaker_name, call.shape.num_choices)
    if service.settings.azure_annotations and call.endpoint in ("chat", "completion"):
        yield AzureAnnotator(
            num_choices=call.shape.num_choices,
            choices_per_prompt=call.choices_per_prompt,
            separate="api-version" in request.query_params,
        )


async def _moderate(
    service: Service, data: dict[str, Any], served: ServedPolicy, max_inputs: int, ticket: Ticket
) -> dict[str, Any]:
    await ticket.start()
    serving = service.serving()
    return await moderate(serving, data, served.policy, max_inputs=max_inputs)


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
    service: Service, call: Call, session: GuardSession, served: ServedPolicy, ticket: Ticket
) -> dict[str, Any] | _OpenStream:
    """A whole response, or a stream as soon as the verdict on every prompt is known.

    Raises:
        ApiError: 400 content_filter for a prompt that tripped, or what went wrong before an answer.
    """
    await ticket.start()
    # While it waited, a canary may have failed.
    serving = service.serving()
    try:
        result = await serving.start(call)
    except ApiError as error:
        act_on_prompt(session, served, call, may_refuse=False)
        if (trip := _trip_behind(error, session)) is not None:
            raise trip from None
        if error.status < 500 and session.num_delivered_tokens:
            raise unreadable_answer() from None
        raise
    if isinstance(result, dict):
        act_on_prompt(session, served, call)
        body = call.format.whole(result, session, call)
        act_on_body(body, session, served, call.endpoint)
        return body
    first: list[str] = []
    prompts = set(range(call.num_prompts))
    try:
        async for event in result:
            act_on_prompt(session, served, call)
            first.append(event)
            # Some formats say something before there is a prompt.
            if call.format.is_end(event) or call.prompts_of(session.judged_choices()) >= prompts:
                break
    except BaseException:
        await result.aclose()
        raise
    return _OpenStream(first, result)


def _trip_behind(error: ApiError, session: GuardSession) -> ApiError | None:
    """The trip that broke an answer off, as tool calls that vLLM could not read for it.

    None where there was none, or where the client may try again, which it has to know whatever
    became of another choice.
    """
    if (report := session.stopped) is None or error.status == _UNAVAILABLE:
        return None
    return stopped(report)


class _Delivery:
    """A stream on its way to the client, and its entry in the metrics."""

    def __init__(
        self,
        opened: _OpenStream,
        call: Call,
        session: GuardSession,
        served: ServedPolicy,
        record: RequestRecord,
    ) -> None:
        self._rest = opened.rest
        self._call = call
        self._record = record
        self.request_id = record.request_id
        self._session = session
        events = call.format.stream(opened.events(), session, call)
        self._events = act_on_stream(events, session, served, call.endpoint)

    async def events(self) -> AsyncIterator[str]:
        num_events = 0
        try:
            async for event in self._events:
                # Written before the client can know that the stream has ended.
                if self._call.format.is_end(event):
                    self._record.complete(self._call.usage())
                await self._record.settle()
                yield event
                num_events += 1
        except ApiError as broken:
            self._record.break_off()
            await self._record.settle()
            error = _trip_behind(broken, self._session) or broken
            yield self._call.format.error_event(error, num_events)

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
