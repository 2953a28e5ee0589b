"""vLLM's own batch of chats next to a breaker: what of keys, policies and limits it cannot honor.

    caller -> its model, its policy's action -> a place -> body -> its fields -> vLLM's route

The engine judges every conversation by the caller's policy. vLLM writes the answer, so there is no
place in it for a refusal or an error, and nobody reads what a request asks of the guard.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from circuit_breakers.api.access import GUARD_FIELD, authenticate, check_model
from circuit_breakers.api.accounting import RequestRecord
from circuit_breakers.api.body import parse_json_object, read_body
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.governed_route import govern, ticket_of
from circuit_breakers.api.service import Service
from circuit_breakers.engine.session import GuardSession, guard_session
from circuit_breakers.metrics import Outcome

__all__ = ["BatchRoute"]

_INSTEAD = "send each conversation to /v1/chat/completions"
_UNREAD_FIELDS = (GUARD_FIELD, "moderation")
"""Fields that tighten, which vLLM would pass over without a word."""


class BatchRoute:
    """Lets requests through to a route of vLLM's that generates, and counts them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._service.new_record(Headers(scope=scope))
        await _Batch(self._app, self._service, record).answer(scope, receive, send)


class _Batch:
    """One request."""

    def __init__(self, app: ASGIApp, service: Service, record: RequestRecord) -> None:
        self._app = app
        self._service = service
        self._record = record
        self._status: int | None = None
        """Of the answer; None before it."""
        self._is_gone = False
        """The client went away before there was an answer."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._record
        try:
            self._check_caller(Request(scope))
            with guard_session() as session:
                record.session = session
                await govern(self._handle, self._service, scope, receive, self._noting(send))
        except ApiError as error:
            await self._abort()
            await self._fail(error, scope, receive, send)
        except ClientDisconnect:
            record.finish("aborted")
        except Exception:
            record.finish("error")
            raise
        except BaseException:
            record.finish("aborted")
            await self._abort()
            raise
        else:
            record.finish("aborted" if self._is_gone else _outcome(session, self._status))

    def _check_caller(self, request: Request) -> None:
        """Passes when what a caller is bound to can be kept.

        Raises:
            ApiError: 404 another model's, 400 for its policy's action, 503 without an engine.
        """
        serving = self._service.serving()
        caller = authenticate(request)
        self._record.key_id = caller.key_id
        check_model(caller, serving.model_name)
        if caller.policy is not None and caller.policy.action != "stop":
            raise ApiError(
                400,
                f"policy {caller.policy.name!r} answers a trip by action {caller.policy.action!r}, "
                f"for which a batch has no place; {_INSTEAD}",
                code="unsupported_action",
            )

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        try:
            raw = await read_body(Request(scope, receive), settings.max_body_bytes)
            _check_fields(parse_json_object(raw), settings.max_choices)
        except ApiError as error:
            await self._fail(error, scope, receive, send)
            return
        await ticket_of(Request(scope)).start()
        self._service.serving()  # while it waited, a canary may have failed
        is_read = False

        async def body() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": raw, "more_body": False}
            message = await receive()
            if message["type"] == "http.disconnect" and self._status is None:
                self._is_gone = True
            return message

        await self._app(scope, body, send)

    async def _abort(self) -> None:
        """Ends what a limit has cut off: vLLM ends its work only for a client that goes away."""
        session, serving = self._record.session, self._service.attached
        if session is None or serving is None:
            return
        for request_id in session.request_ids:
            await serving.guarded.abort(request_id)

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._record.fail(error)
        error.headers["X-Request-Id"] = self._record.request_id
        await error.to_response()(scope, receive, send)

    def _noting(self, send: Send) -> Send:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                if self._record.session is not None and not self._is_gone:
                    # Before the client can know of its trips.
                    self._record.finish(_outcome(self._record.session, self._status))
                    await self._record.settle()
                headers = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                headers.append((b"x-request-id", self._record.request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        return noting


def _check_fields(data: dict[str, Any], max_choices: int) -> None:
    """Passes for a batch that asks nothing of the guard, and of a size that one place may have.

    Raises:
        ApiError: 400, naming the field.
    """
    for name in _UNREAD_FIELDS:
        if data.get(name) is not None:
            raise ApiError(
                400,
                f"{name!r} is not read in a batch; {_INSTEAD}",
                code="unsupported_parameter",
                param=name,
            )
    messages = data.get("messages")
    if isinstance(messages, list) and len(messages) > max_choices:
        raise ApiError(
            400,
            f"got {len(messages)} conversations in one request, expected at most {max_choices}; "
            "send several requests, or set CIRCUIT_BREAKERS_MAX_CHOICES on the server",
            code="invalid_value",
            param="messages",
        )


def _outcome(session: GuardSession, status: int | None) -> Outcome:
    if session.prompt_tripped is not None:
        return "tripped_prompt"
    if session.stopped is not None:
        return "tripped_completion"
    if status is None or status >= 500:
        return "error"
    return "rejected" if status >= 400 else "ok"
