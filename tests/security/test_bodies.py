"""A body has one reading: what another program could read differently is refused.

The prompt trips on " zebra" (breaker_for_words.py), in whatever valid way it is written.
"""

from __future__ import annotations

import base64
import gzip
import json

import pytest

from ..server.api.conftest import Server
from .wire import CHAT, TRIP, exchange, request

TRIP_TEXT = json.dumps(TRIP)
SMALL = '{"messages":[{"role":"user","content":"hi"}],"max_tokens":1'
ENCODED: dict[str, tuple[bytes, str]] = {
    "escapes": (
        TRIP_TEXT.replace("zebra", "".join(f"\\u{ord(c):04x}" for c in "zebra")).encode(),
        "",
    ),
    "escaped key": (TRIP_TEXT.replace('"content"', '"c\\u006fntent"').encode(), ""),
    "charset utf-7": (TRIP_TEXT.encode(), "application/json; charset=utf-7"),
    "charset utf-16": (TRIP_TEXT.encode(), "application/json; charset=utf-16"),
    "type in capitals": (TRIP_TEXT.encode(), "APPLICATION/JSON"),
    "spaces around": (b" \r\n\t" + TRIP_TEXT.encode() + b"\n", ""),
}
UNREADABLE: dict[str, tuple[bytes, str, int]] = {
    "utf-16": (TRIP_TEXT.encode("utf-16"), "", 400),
    "utf-16 without mark": (TRIP_TEXT.encode("utf-16-le"), "", 400),
    "utf-32": (TRIP_TEXT.encode("utf-32"), "", 400),
    "byte order mark": (b"\xef\xbb\xbf" + TRIP_TEXT.encode(), "", 400),
    "latin-1": (TRIP_TEXT.replace("zebra", "z\xe9bra").encode("latin-1"), "", 400),
    "base64": (base64.b64encode(TRIP_TEXT.encode()), "", 400),
    "gzip": (b"\x1f\x8b\x08" + TRIP_TEXT.encode(), "", 400),
    "nul behind": (TRIP_TEXT.encode() + b"\0", "", 400),
    "two objects": (SMALL.encode() + b"}" + TRIP_TEXT.encode(), "", 400),
    "comment": (b"/**/" + TRIP_TEXT.encode(), "", 400),
    "single quotes": (TRIP_TEXT.replace('"', "'").encode(), "", 400),
    "list": (b"[" + TRIP_TEXT.encode() + b"]", "", 400),
    "form": (b"messages=a+zebra", "application/x-www-form-urlencoded", 415),
    "multipart": (TRIP_TEXT.encode(), "multipart/form-data; boundary=a", 415),
    "text": (TRIP_TEXT.encode(), "text/plain", 415),
    "json lines": (TRIP_TEXT.encode(), "application/jsonl", 415),
    "problem": (TRIP_TEXT.encode(), "application/problem+json", 415),
    "two types": (TRIP_TEXT.encode(), "text/plain, application/json", 415),
    "key twice": (f'{SMALL},"messages":[]}}'.encode(), "", 400),
    "key twice, escaped": (f'{SMALL},"m\\u0065ssages":[]}}'.encode(), "", 400),
    "key twice, trip first": (f"{TRIP_TEXT[:-1]},{SMALL[1:]}}}".encode(), "", 400),
    "key twice, trip last": (f"{SMALL},{TRIP_TEXT[1:]}".encode(), "", 400),
    "key twice in a message": (
        b'{"messages":[{"role":"user","content":"hi","content":"a zebra"}],"max_tokens":1}',
        "",
        400,
    ),
    "key twice in an option": (
        f'{SMALL},"logit_bias":{{"5":1,"5":2}}}}'.encode(),
        "",
        400,
    ),
}


@pytest.mark.parametrize(("raw", "content_type"), ENCODED.values(), ids=ENCODED.keys())
def test_a_prompt_trips_however_it_is_written(
    server: Server, raw: bytes, content_type: str
) -> None:
    reply = exchange(server, request(CHAT, raw, content_type=content_type or "application/json"))
    assert (reply.status, reply.code) == (400, "content_filter")


@pytest.mark.parametrize(
    ("raw", "content_type", "status"), UNREADABLE.values(), ids=UNREADABLE.keys()
)
def test_a_body_that_others_may_read_otherwise_is_refused(
    server: Server, raw: bytes, content_type: str, status: int
) -> None:
    reply = exchange(server, request(CHAT, raw, content_type=content_type or "application/json"))
    assert reply.status == status
    assert reply.code in ("invalid_json", "unsupported_media_type")


def test_a_packed_body_is_not_unpacked(server: Server) -> None:
    packed = gzip.compress(TRIP_TEXT.encode())
    for coding in ("gzip", "deflate", "br", "zstd", "x-unknown"):
        reply = exchange(server, request(CHAT, packed, f"Content-Encoding: {coding}"))
        assert (reply.status, reply.code) == (400, "invalid_json")
