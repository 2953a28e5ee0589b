"""Where one request ends and the next begins is never in doubt: what could be read in two ways is
refused, and the connection with it."""

from __future__ import annotations

import json

import pytest

from circuit_breakers.api.connection import MAX_HEAD_BYTES

from ..server.api.conftest import Server
from .wire import CHAT, TRIP, exchange, request

TRIP_BODY = json.dumps(TRIP).encode()
HIDDEN = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
"""The request that must not be seen as one."""
START = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
LENGTH = b"Content-Length: %d\r\n" % len(TRIP_BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(TRIP_BODY), TRIP_BODY)

AMBIGUOUS = {
    "length and chunks": START + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": START + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "two lengths": START + LENGTH + b"Content-Length: 0\r\n\r\n" + TRIP_BODY,
    "two equal lengths": START + LENGTH + LENGTH + b"\r\n" + TRIP_BODY,
    "list of lengths": START + b"Content-Length: 0, 0\r\n\r\n",
    "signed length": START + b"Content-Length: +0\r\n\r\n",
    "negative length": START + b"Content-Length: -1\r\n\r\n",
    "hexadecimal length": START + b"Content-Length: 0x0\r\n\r\n",
    "length with a space": START + b"Content-Length: 0 0\r\n\r\n",
    "empty length": START + b"Content-Length:\r\n\r\n",
    "huge length": START + b"Content-Length: 99999999999999999999\r\n\r\n",
    "bare line feeds": (START + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + TRIP_BODY,
    "bare line feed at the end": START + LENGTH + b"\n" + TRIP_BODY,
    "bare line feed in a header": START + b"X: a\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "bare carriage return": START + b"X: a\r" + LENGTH + b"\r\n" + TRIP_BODY,
    "folded header": START + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "folded coding": START + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS,
    "coding: unknown": START + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "coding: identity": START + b"Transfer-Encoding: identity\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "coding: chunked first": START + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS,
    "coding: gzip": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "coding: twice": START + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
    "coding: two": START + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + CHUNKS,
    "coding: quoted": START + b'Transfer-Encoding: "chunked"\r\n\r\n' + CHUNKS,
    "coding: space before the colon": START + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "coding: vertical tab": START + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "coding in HTTP/1.0": START.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS,
    "header starts with a space": START + b" X: a\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "header without a colon": START + b"X\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "nul in a value": START + b"X: a\0b\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "nul in a name": START + b"X\0: a\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "chunk size: not a number": START + CHUNKED + b"\r\nzz\r\n" + TRIP_BODY,
    "chunk size: prefixed": START + CHUNKED + b"\r\n0x1\r\na\r\n0\r\n\r\n",
    "chunk size: too large": START + CHUNKED + b"\r\nffffffffffffffffff\r\na\r\n0\r\n\r\n",
    "chunk size: space": START + CHUNKED + b"\r\n1 \r\na\r\n0\r\n\r\n",
    "chunk: bare line feeds": START + CHUNKED + b"\r\n1\na\n0\n\n",
    "chunk: longer than its size": START + CHUNKED + b"\r\n1\r\nab\r\n0\r\n\r\n",
    "chunk extension: bare line feed": START + CHUNKED + b"\r\n1;a\nb\r\na\r\n0\r\n\r\n",
    "length in the trailers": START + CHUNKED + b"\r\n1\r\na\r\n0\r\nContent-Length: 5\r\n\r\n",
    "coding in the trailers": START + CHUNKED + b"\r\n1\r\na\r\n0\r\n" + CHUNKED + b"\r\n",
    "two hosts": START + b"Host: y\r\n" + LENGTH + b"\r\n" + TRIP_BODY,
    "no host": START.replace(b"Host: x\r\n", b"") + LENGTH + b"\r\n" + TRIP_BODY,
    "unknown version": START.replace(b"1.1", b"1.2") + LENGTH + b"\r\n" + TRIP_BODY,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("raw", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_could_be_read_in_two_ways_ends_the_connection(server: Server, raw: bytes) -> None:
    reply = exchange(server, raw + HIDDEN)
    assert reply.status == 400
    assert b'"live"' not in reply.raw


GUARDED = {
    "chunks": START + CHUNKED + b"Connection: close\r\n\r\n" + CHUNKS,
    "one byte a chunk": START
    + CHUNKED
    + b"Connection: close\r\n\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in TRIP_BODY)
    + b"0\r\n\r\n",
    "trailers": START
    + CHUNKED
    + b"Connection: close\r\n\r\n"
    + CHUNKS.replace(b"0\r\n\r\n", b"0\r\nContent-Type: text/plain\r\nX: a\r\n\r\n"),
    "chunk extension": START
    + CHUNKED
    + b"Connection: close\r\n\r\n"
    + CHUNKS.replace(b"\r\n", b";a=b\r\n", 1),
    "HTTP/1.0": START.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + TRIP_BODY,
    "header names in capitals": START + LENGTH.upper() + b"CONNECTION: close\r\n\r\n" + TRIP_BODY,
    "empty lines before": b"\r\n\r\n" + request(CHAT, TRIP),
}


@pytest.mark.parametrize("raw", GUARDED.values(), ids=GUARDED.keys())
def test_an_unusual_framing_gets_no_prompt_past(server: Server, raw: bytes) -> None:
    reply = exchange(server, raw)
    assert (reply.status, reply.code) == (400, "content_filter")


def test_each_request_of_a_pipeline_is_judged(server: Server) -> None:
    benign = dict(TRIP, messages=[{"role": "user", "content": "hi"}])
    first = request(CHAT, benign, "Connection: keep-alive")
    reply = exchange(server, first + request(CHAT, TRIP))
    assert reply.statuses == [200, 400]
    assert b"content_filter" in reply.raw


@pytest.mark.parametrize(
    "raw",
    [
        START + b"X: " + b"a" * (8 * MAX_HEAD_BYTES),
        START + b"X: a\r\n" * (2 * MAX_HEAD_BYTES),
        b"GET /" + b"a" * (8 * MAX_HEAD_BYTES),
        START + CHUNKED + b"\r\n0\r\n" + b"X: a\r\n" * (2 * MAX_HEAD_BYTES),
    ],
    ids=["header", "headers", "path", "trailers"],
)
def test_a_huge_head_gets_nothing(server: Server, raw: bytes) -> None:
    assert 200 not in exchange(server, raw).statuses
