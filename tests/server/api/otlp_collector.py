"""A collector that takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ...local_server import answering, url_of

__all__ = ["Collector", "Span", "collector"]


class Span(NamedTuple):
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    is_error: bool
    resource: dict[str, Any]


class Collector:
    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: set[str] = set()
        self.bodies: list[bytes] = []
        self.spans: list[Span] = []

    def wait_for(self, response_id: str) -> tuple[Span, Span]:
        """The request's span of that gen_ai.response.id, and its guard's."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for span in self.spans:
                if span.attributes.get("gen_ai.response.id") == response_id:
                    for inner in self.spans:
                        if inner.parent_id == span.span_id:
                            return span, inner
            time.sleep(0.05)
        raise AssertionError(f"no span of {response_id}: {[s.attributes for s in self.spans]}")

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        self.bodies.append(body)
        message = ExportTraceServiceRequest.FromString(body)
        for of_resource in message.resource_spans:
            resource = _plain(of_resource.resource.attributes)
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    self.spans.append(
                        Span(
                            name=span.name,
                            kind=span.kind,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            attributes=_plain(span.attributes),
                            events=[(e.name, _plain(e.attributes)) for e in span.events],
                            is_error=span.status.code == span.status.STATUS_CODE_ERROR,
                            resource=resource,
                        )
                    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            kept.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with answering(Handler) as server:
        kept = Collector(url_of(server))
        yield kept
