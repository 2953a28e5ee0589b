"""Only the listed routes answer, under the listed spelling, to the listed methods."""

from __future__ import annotations

import pytest

from ..server.api.conftest import Server
from .wire import CHAT, TRIP, exchange, request

SPELLINGS = {
    "double slash": "//v1/chat/completions",
    "double slash inside": "/v1//chat/completions",
    "trailing slash": "/v1/chat/completions/",
    "trailing dot": "/v1/chat/completions.",
    "dot segment": "/v1/./chat/completions",
    "dot-dot segment": "/v1/models/../chat/completions",
    "dot-dot semicolon": "/v1/models/..;/chat/completions",
    "path parameter": "/v1/chat/completions;x",
    "path parameter with value": "/v1/chat/completions;jsessionid=1",
    "path parameter inside": "/v1;x/chat/completions",
    "upper case": "/V1/CHAT/COMPLETIONS",
    "mixed case": "/v1/chat/Completions",
    "escaped slash": "/v1%2Fchat%2Fcompletions",
    "escaped slash, lower case": "/v1/chat%2fcompletions",
    "escaped letters": "/%76%31/chat/completions",
    "escaped twice": "/v1/chat%252fcompletions",
    "overlong escape": "/v1%c0%afchat/completions",
    "escaped nul": "/v1/chat/completions%00",
    "escaped space": "/v1/chat/completions%20",
    "escaped line break": "/v1/chat/completions%0d%0aX-Evil:%20yes",
    "escaped question mark": "/v1/chat/completions%3fx=1",
    "escaped dot-dot": "/v1/models/%2e%2e/chat/completions",
    "bad escape": "/v1/chat/completions%zz",
    "extension": "/v1/chat/completions.json",
    "prefix": "/v1/chat",
    "more behind": "/v1/chat/completions/batch",
    "without version": "/chat/completions",
    "another version": "/v2/chat/completions",
    "root": "/",
    "backslash escaped": "/v1%5Cchat%5Ccompletions",
    "wildcard": "/v1/*",
    "documentation": "/docs",
    "metrics with slash": "/metrics/",
    "console with slash": "/console/",
    "console: its folder": "/console/assets",
    "console: out of its folder": "/console/assets/../../api/app.py",
    "console: out of its folder, escaped": "/console/assets/..%2f..%2fapi%2fapp.py",
    "console: not built": "/console/assets/main.ts",
    "vLLM: invocations": "/invocations",
    "vLLM: adapters": "/v1/load_lora_adapter",
    "vLLM: raw tokens": "/inference/v1/generate",
    "vLLM: scoring": "/generative_scoring",
    "vLLM: pooling": "/pooling",
    "vLLM: workers": "/collective_rpc",
    "vLLM: sleep": "/sleep",
}


@pytest.mark.parametrize("path", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_another_path_or_spelling_is_unknown(server: Server, path: str) -> None:
    for method in ("POST", "GET"):
        reply = exchange(server, request(path, TRIP, method=method))
        assert (reply.status, reply.code) == (404, "unknown_route")
        # What was asked for comes back as JSON text, never as a header.
        assert b"x-evil" not in reply.raw.split(b"\r\n\r\n")[0].lower()


MALFORMED_TARGETS = {
    "absolute": "http://x/v1/chat/completions",
    "absolute, https": "https://x:443/v1/chat/completions",
    "authority": "x:443",
    "asterisk": "*",
    "fragment": "/v1/chat/completions#x",
    "fragment in the query": "/v1/chat/completions?a#b",
    "backslash": "\\v1\\chat\\completions",
    "no slash": "v1/chat/completions",
    "not ASCII": "/v1/chat/completions\xe9",
    "nul": "/v1/chat/completions\0",
    "tab": "/v1/chat/completions\t",
    "space": "/v1/chat/completions x",
}


@pytest.mark.parametrize("target", MALFORMED_TARGETS.values(), ids=MALFORMED_TARGETS.keys())
def test_a_target_of_another_form_is_malformed(server: Server, target: str) -> None:
    for method in ("POST", "CONNECT"):
        assert exchange(server, request(target, TRIP, method=method)).status == 400


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "PROPFIND", "M-SEARCH"]
)
def test_another_method_is_refused(server: Server, method: str) -> None:
    for path, status in ((CHAT, 405), ("/v1/completions", 405), ("/v1/unheard/of", 404)):
        reply = exchange(server, request(path, TRIP, method=method))
        assert reply.status == status
        if method == "TRACE":
            assert b"zebra" not in reply.body, "nothing is echoed"


@pytest.mark.parametrize("method", ["post", "FOO", "POST\t", "", "P\0ST"])
def test_a_method_that_is_none_is_malformed(server: Server, method: str) -> None:
    assert exchange(server, request(CHAT, TRIP, method=method)).status == 400


@pytest.mark.parametrize(
    "query", ["?", "?stream=true", "?model=other&mode=observe", "?%00", "?a=%2f..%2f", "?;x"]
)
def test_a_query_changes_nothing(server: Server, query: str) -> None:
    reply = exchange(server, request(CHAT + query, TRIP))
    assert (reply.status, reply.code) == (400, "content_filter")


@pytest.mark.parametrize("path", [CHAT, "/", "/v1/realtime", "/ws", "/livez"])
def test_no_connection_is_upgraded_to_a_websocket(server: Server, path: str) -> None:
    handshake = (
        "Connection: close, Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    reply = exchange(server, request(path, b"", *handshake, method="GET"))
    assert reply.status == {CHAT: 405, "/livez": 200}.get(path, 404)


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "TLS/1.0"])
def test_an_offered_upgrade_does_not_get_a_prompt_past(server: Server, protocol: str) -> None:
    # A request hides behind the body.
    hidden = request("/livez", method="GET")
    offer = ("Connection: close, Upgrade", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABkAAQA")
    reply = exchange(server, request(CHAT, TRIP, *offer) + hidden)
    assert reply.status == 400
    # Java's own client offers one unasked, so its users are told the cure.
    assert b"HTTP_1_1" in reply.body


@pytest.mark.parametrize(
    "header",
    [
        "X-HTTP-Method-Override: GET",
        "X-Original-URL: /livez",
        "X-Rewrite-URL: /livez",
        "X-Forwarded-Prefix: /livez",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: localhost",
        "Forwarded: for=127.0.0.1;host=localhost",
        "X-Request-Id: ../../etc",
        "X-Vllm-Priority: -5",
        "X-data-parallel-rank: 7",
        "X-Session-ID: a",
        "Authorization: Bearer ",
        "Authorization: Basic Og==",
        "Expect: 100-continue",
        "Content-Encoding: identity",
        "Accept: text/html",
        "Origin: null",
        "Cookie: admin=1",
        "OpenAI-Beta: assistants=v2",
    ],
)
def test_no_header_gets_a_prompt_past(server: Server, header: str) -> None:
    reply = exchange(server, request(CHAT, TRIP, header))
    # 100 (Continue) may come first.
    assert reply.statuses[-1] == 400
    assert b"content_filter" in reply.raw
