"""What a connection bears, on raw sockets: sizes and times that uvicorn leaves unbounded."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import pytest

from circuit_breakers.api.connection import MAX_HEAD_BYTES, http_server

from .scripted import Scripted, scripted_server

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


async def answer_to(server: Scripted, *pieces: bytes) -> bytes:
    """What comes back until the connection ends, by whoever; b"" when it was just cut."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def endless(piece: bytes) -> list[bytes]:
    """Well over the limit, in pieces below it."""
    return [piece * (32 * 1024 // len(piece))] * (4 * MAX_HEAD_BYTES // (32 * 1024))


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (GET + b"X-Long: ", b"a"),
        (GET, b"X-Many: a\r\n"),
        (GET + b"X", b"x"),
        (b"GET /", b"a"),
        (CHUNKED + b"0\r\n", b"X-Trailer: a\r\n"),
        (CHUNKED + b"0\r\nX-Trailer: ", b"a"),
        (CHUNKED + b"1;", b"a"),
    ],
    ids=["value", "headers", "name", "path", "trailers", "trailer", "chunk extension"],
)
def test_a_head_without_an_end_is_cut_off(start: bytes, piece: bytes) -> None:
    async def test() -> None:
        async with scripted_server() as server:
            assert b" 200 " not in await answer_to(server, start, *endless(piece))
            assert (await server.post()).status_code == 200
            await server.nothing_left()

    run(test())


def test_long_bodies_and_small_chunks_are_within_bounds() -> None:
    async def test() -> None:
        async with scripted_server() as server:
            padded = b" " * (2 * MAX_HEAD_BYTES) + b"{}"
            answer = await answer_to(
                server,
                HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(padded),
                padded,
            )
            assert answer.startswith(b"HTTP/1.1 200 ")
            small = b"".join(b"1\r\n%c\r\n" % byte for byte in padded)
            close = CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close")
            answer = await answer_to(server, close, small, b"0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")

    run(test())


def test_many_requests_on_one_connection_do_not_add_up() -> None:
    async def test() -> None:
        async with scripted_server() as server:
            big = GET + b"X-Big: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n"
            pieces = [big + b"\r\n"] * 5 + [big + b"Connection: close\r\n\r\n"]
            assert (await answer_to(server, *pieces)).count(b"HTTP/1.1 200 OK") == 6

    run(test())


@pytest.mark.parametrize(
    "start",
    [b"", GET, GET + b"X-Half: "],
    ids=["silent", "head", "header"],
)
def test_a_head_that_stops_coming_ends_the_connection(start: bytes) -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.3) as server:
            assert await answer_to(server, start) == b""

    run(test())


def test_a_second_head_that_stops_coming_does_too() -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.3) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(GET + b"\r\n")
            await reader.readuntil(b'"live"}')
            writer.write(GET)  # ends the server's wait for a next request, and says no more
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()

    run(test())


def test_a_body_that_goes_on_after_the_answer_ends_the_connection() -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.3) as server:
            unknown = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(unknown)
            assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(10):
                    while True:
                        writer.write(b"a")
                        await writer.drain()
                        await asyncio.sleep(0.02)
            writer.close()

    run(test())


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.5) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            body = b'{"stream":true,"num_events":100000,"num_chars":10000}'
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            async with asyncio.timeout(10):
                while server.serving.num_started == 0:
                    await asyncio.sleep(0.01)
            # Long before the request's own time is over.
            await server.nothing_left()
            assert server.outcomes("aborted") == 1
            writer.close()

    run(test())


def test_blank_lines_keep_no_connection() -> None:
    async def test() -> None:
        async with scripted_server(body_timeout_s=0.3) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(GET + b"\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.2)
            # uvicorn's own timer ends with any byte.
            writer.write(b"\r\n")
            async with asyncio.timeout(10):
                with suppress(ConnectionError):
                    await reader.read()
            writer.close()

    run(test())


def test_an_idle_connection_outlives_those_of_load_balancers() -> None:
    """AWS's ALB and nginx keep one for 60 s; whoever ends it first must be the client."""

    async def app(*_: Any) -> None:
        raise AssertionError("nobody asks")

    assert http_server(app, timeout_s=1).config.timeout_keep_alive > 60
