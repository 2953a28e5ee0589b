"""Limits over HTTP: our app and our server with a script for an engine (scripted.py)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.governed_route import GovernedRoute, govern, ticket_of
from circuit_breakers.settings import ServeSettings

from .scripted import Scripted, scripted_server

LONG = {"stream": True, "num_events": 1000, "pause_s": 0.05}
FLOOD = {"stream": True, "num_events": 10**5, "num_chars": 10**4}
SLOW = {"num_events": 1, "pause_s": 30}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_every_route_that_generates_is_governed() -> None:
    app = create_app(ServeSettings(), CollectorRegistry())
    posts = [r for r in app.routes if isinstance(r, APIRoute) and "POST" in r.methods]
    assert {r.path for r in posts} >= {"/v1/chat/completions", "/v1/completions"}
    # Acts of the operator take no place: they must get through when the house is full.
    guests = [r for r in posts if not r.path.startswith("/v1/breaker")]
    assert [r.path for r in guests if not isinstance(r, GovernedRoute)] == []


def test_a_handler_that_answers_without_a_place_answers_nothing() -> None:
    app = create_app(ServeSettings(), CollectorRegistry())
    router = APIRouter(route_class=GovernedRoute)

    @router.post("/forgetful")
    async def forgetful() -> JSONResponse:
        return JSONResponse({"said": "unlimited"})

    app.include_router(router)
    with pytest.raises(AssertionError, match="start"):
        TestClient(app).post("/forgetful", json={})


def test_a_stream_whose_last_byte_was_sent_gets_no_error_behind_it() -> None:
    """Its handler may still be tidying up when the time is over; uvicorn raises on more bytes."""
    app = create_app(ServeSettings(request_timeout_s=0.05), CollectorRegistry())
    sent: list[Any] = []

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        await ticket_of(Request(scope)).start()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: [DONE]", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "app": app, "path": "/v1/chat/completions", "headers": []}
    run(govern(handle, app.state.service, scope, send, send))
    assert [message.get("more_body") for message in sent] == [None, True, False]


def test_a_rate_limit_is_told_in_openais_headers() -> None:
    async def test() -> None:
        async with scripted_server(requests_per_minute=2) as server:
            first = await server.post()
            assert first.status_code == 200
            assert first.headers["x-ratelimit-limit-requests"] == "2"
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert first.headers["x-ratelimit-reset-requests"] == "30s"
            stream = await server.post(stream=True)
            assert stream.headers["x-ratelimit-remaining-requests"] == "0"
            refused = await server.post()
            assert refused.status_code == 429
            error = error_of(refused)
            assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert server.refusals("rate_limit_exceeded") == 1
            # Neither a probe nor a wrong method takes a token.
            assert (await server.http.get("/readyz")).status_code == 200
            assert (await server.http.get("/v1/chat/completions")).status_code == 405

    run(test())


def test_without_a_rate_limit_nothing_is_said_of_one() -> None:
    async def test() -> None:
        async with scripted_server() as server:
            names = (await server.post()).headers.keys()
            assert [name for name in names if name.startswith("x-ratelimit")] == []

    run(test())


def test_a_full_server_says_503_and_its_metrics_say_why() -> None:
    async def test() -> None:
        async with scripted_server(max_concurrent_requests=1, max_queued_requests=1) as server:
            streaming = asyncio.create_task(server.post(**LONG))
            await until(lambda: server.serving.num_open == 1)
            waiting = asyncio.create_task(server.post(**SLOW))
            await until(lambda: server.service.admission.num_waiting == 1)
            samples = (await server.http.get("/metrics")).text
            assert "circuit_breakers_running_requests 1.0" in samples
            assert "circuit_breakers_waiting_requests 1.0" in samples
            refused = await server.post()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert error_of(refused)["code"] == "queue_full"
            assert server.refusals("queue_full") == 1
            assert server.serving.num_started == 1, "who waits has not started"
            for task in (waiting, streaming):
                task.cancel()
            await asyncio.gather(waiting, streaming, return_exceptions=True)
            await server.nothing_left()

    run(test())


def test_a_request_over_its_time_is_a_504_before_the_first_byte() -> None:
    async def test() -> None:
        async with scripted_server(request_timeout_s=0.2) as server:
            response = await server.post(**SLOW)
            assert response.status_code == 504
            error = error_of(response)
            assert (error["type"], error["code"]) == ("server_error", "request_timeout")
            assert "0.2 s" in error["message"]
            await server.nothing_left()
            assert server.refusals("request_timeout") == 1
            assert (server.outcomes("error"), server.outcomes("aborted")) == (1, 0)

    run(test())


def test_a_stream_over_its_time_ends_with_an_error_and_no_done() -> None:
    async def test() -> None:
        async with scripted_server(request_timeout_s=0.3) as server:
            response = await server.post(**LONG)
            assert response.status_code == 200
            *events, last = response.text.removesuffix("\n\n").split("\n\n")
            assert events and all('"content":"x"' in event for event in events)
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
            assert "[DONE]" not in response.text
            await server.nothing_left()
            assert (server.outcomes("error"), server.outcomes("aborted")) == (1, 0)

    run(test())


def test_a_client_that_reads_nothing_loses_its_place() -> None:
    async def test() -> None:
        async with scripted_server(request_timeout_s=1) as server:
            _, writer = await post_raw(server, FLOOD)
            await until(lambda: server.serving.num_open == 1)
            await server.nothing_left()
            assert server.refusals("request_timeout") == 1
            writer.close()

    run(test())


async def post_raw(
    server: Scripted, script: dict[str, Any], *, announced: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    body = json.dumps(script).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (announced or len(body), body)
    )
    await writer.drain()
    return reader, writer


def test_a_body_that_stops_coming_is_a_408() -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.2) as server:
            reader, writer = await post_raw(server, {}, announced=1000)
            answer = (await asyncio.wait_for(reader.read(), 10)).decode()
            assert answer.startswith("HTTP/1.1 408 ")
            assert "connection: close" in answer.lower()
            assert '"code":"body_timeout"' in answer
            assert server.refusals("body_timeout") == 1
            await server.nothing_left()
            writer.close()

    run(test())


def test_a_slow_body_takes_a_place_in_the_queue_and_no_slot() -> None:
    async def test() -> None:
        async with scripted_server(max_concurrent_requests=1) as server:
            _, writer = await post_raw(server, {}, announced=1000)
            await until(lambda: server.service.admission.num_waiting == 1)
            assert (await server.post()).status_code == 200
            writer.close()
            await server.nothing_left()
            assert server.outcomes("aborted") == 1

    run(test())


def test_aborted_requests_leave_nothing_behind() -> None:
    async def test() -> None:
        limits = {"max_concurrent_requests": 3, "max_queued_requests": 200}
        async with scripted_server(**limits) as server:

            async def leave(i: int) -> None:
                if i % 4 == 0:  # in the middle of its body
                    _, writer = await post_raw(server, {}, announced=1000)
                    await asyncio.sleep(0.01 * (i % 5))
                    writer.transport.abort()
                    return
                script = LONG if i % 2 else SLOW
                reader, writer = await post_raw(server, script)
                if i % 3 == 0:  # in line, or before the first byte
                    await asyncio.sleep(0.01 * (i % 7))
                elif i % 2:  # half way through its stream, or in line for good
                    with_answer = reader.readuntil(b'"content":"x"')
                    await asyncio.wait([asyncio.ensure_future(with_answer)], timeout=1)
                writer.transport.abort()

            await asyncio.gather(*(leave(i) for i in range(120)))
            await server.nothing_left()
            assert server.serving.num_started > 3, "places were given back and taken again"
            # The house is whole.
            answers = await asyncio.gather(*(server.post(pause_s=0.01) for _ in range(12)))
            assert [a.status_code for a in answers] == [200] * 12

    run(test())


def test_a_shut_house_sends_the_next_request_of_a_connection_elsewhere() -> None:
    async def test() -> None:
        async with scripted_server() as server:
            streaming = asyncio.create_task(server.post(stream=True, num_events=6, pause_s=0.1))
            await until(lambda: server.serving.num_open == 1)
            server.service.leave()
            ready = await server.http.get("/readyz")
            assert (ready.status_code, ready.json()["reason"]) == (503, "shutting down")
            assert (await server.post()).status_code == 200, "not closed yet"
            server.service.admission.close()
            refused = await server.post()
            assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
            assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
            assert (await server.http.get("/livez")).status_code == 200
            assert (await streaming).text.endswith("data: [DONE]\n\n"), "who runs may finish"

    run(test())


def test_errors_of_a_limit_are_in_the_app_without_our_server_too() -> None:
    app: FastAPI = create_app(ServeSettings(), CollectorRegistry())
    app.state.service.admission.close()
    response = TestClient(app).post("/v1/completions", json={})
    assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")
