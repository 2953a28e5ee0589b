"""OpenTelemetry spans over OTLP/HTTP: one for each completion request, with the guard's inside.

    chat smollm2-135m-instruct          GenAI semantic conventions; child of the caller's span
      └── guard                         breaker, policy, mode, probe, score, threshold
            └── event: trip             phase, token index, action

Both are made when the request ends and sent by a thread of its own from a bounded queue, so a
collector that is slow or gone costs spans and nothing else. Never text of a prompt or an answer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from circuit_breakers.api.request_summary import RequestSummary
from circuit_breakers.errors import ConfigError
from circuit_breakers.metrics import was_stopped
from circuit_breakers.settings import ServeSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["RequestTracer", "open_tracer"]

_TRACES_PATH = "/v1/traces"
_CLOSE_S = 2.0
"""At the end of the server, for spans that are still in the queue."""
_OPERATIONS = {
    "chat": "chat",
    "completion": "text_completion",
    "response": "chat",
    "message": "chat",
    "moderation": "moderation",
}
"""gen_ai.operation.name by endpoint; the last one is none of the conventions'."""
_SERVICE_NAME = "circuit-breakers"
_PROVIDER_NAME = "circuit_breakers"

Attributes = dict[str, Any]


def open_tracer(settings: ServeSettings) -> RequestTracer | None:
    """The tracer that the settings ask for; None when they ask for none.

    Raises:
        ConfigError: the endpoint is no URL, or OpenTelemetry is not installed.
    """
    if settings.otlp_endpoint is None:
        return None
    parts = urlsplit(settings.otlp_endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"got --otlp-endpoint {settings.otlp_endpoint!r}, expected the URL of a collector that "
            "takes OTLP over HTTP, e.g. http://localhost:4318"
        )
    url = settings.otlp_endpoint.rstrip("/")
    try:
        return RequestTracer(url if url.endswith(_TRACES_PATH) else url + _TRACES_PATH)
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"--otlp-endpoint needs {e.name!r}, which is not installed; "
            "pip install 'circuit-breakers[otel]', or leave it out"
        ) from e


class RequestTracer:
    """Sends what is told of each request to one collector."""

    def __init__(self, url: str) -> None:
        """Starts the thread that sends.

        Raises:
            ModuleNotFoundError: the extra `otel` is not installed.
        """
        # Deferred: a server that traces nothing does without them.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", _SERVICE_NAME),
                "service.version": version("circuit-breakers"),
            }
        )
        # By default a caller's traceparent decides whether there is a span, of a trip too.
        self._provider: TracerProvider = TracerProvider(
            sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("circuit_breakers", version("circuit-breakers"))
        self._propagator = TraceContextTextMapPropagator()

    def record(self, summary: RequestSummary) -> None:
        """Queues the spans of a request that has ended."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        operation = _OPERATIONS[summary.endpoint]
        end_ns = summary.started_ns + round(summary.duration_s * 1e9)
        span = self._tracer.start_span(
            f"{operation} {summary.model}",
            context=self._propagator.extract(summary.trace_headers, Context()),
            kind=SpanKind.SERVER,
            attributes=_known(_request_attributes(summary, operation)),
            start_time=summary.started_ns,
        )
        if summary.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        if summary.report is not None:
            guard = self._tracer.start_span(
                "guard",
                context=set_span_in_context(span, Context()),
                attributes=_known(_guard_attributes(summary)),
                start_time=summary.started_ns,
            )
            for choice, report in summary.trips:
                guard.add_event(
                    "trip",
                    _known(
                        {
                            "circuit_breakers.choice": choice,
                            "circuit_breakers.phase": report.phase,
                            "circuit_breakers.probe": report.probe,
                            "circuit_breakers.score": report.score,
                            "circuit_breakers.threshold": report.threshold,
                            "circuit_breakers.token_index": report.token_index,
                            "circuit_breakers.action": "stopped"
                            if was_stopped(report)
                            else "observed",
                        }
                    ),
                    timestamp=end_ns,
                )
            guard.end(end_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Sends what is queued, as far as that takes no longer than a moment."""
        # By itself it would try for half a minute to reach a collector that is gone.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def _request_attributes(summary: RequestSummary, operation: str) -> Attributes:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER_NAME,
        "gen_ai.request.model": summary.model,
        "gen_ai.response.model": summary.model,
        "gen_ai.response.id": summary.request_id,
        "gen_ai.response.finish_reasons": summary.finish_reasons or None,
        "gen_ai.usage.input_tokens": summary.num_prompt_tokens,
        "gen_ai.usage.output_tokens": summary.num_completion_tokens,
        "circuit_breakers.delivered_ttft_s": summary.ttft_s,
        # A trip is no error.
        "error.type": (summary.error or summary.outcome)
        if summary.outcome in ("rejected", "error")
        else None,
        "circuit_breakers.outcome": summary.outcome,
        "circuit_breakers.key_id": summary.key_id,
    }


def _guard_attributes(summary: RequestSummary) -> Attributes:
    report = summary.report
    assert report is not None, "a guard span has a report"
    return {
        "circuit_breakers.breaker": report.breaker,
        "circuit_breakers.policy": report.policy,
        "circuit_breakers.mode": report.mode,
        "circuit_breakers.tripped": report.tripped,
        "circuit_breakers.phase": report.phase,
        "circuit_breakers.probe": report.probe,
        "circuit_breakers.score": report.score,
        "circuit_breakers.threshold": report.threshold,
        "circuit_breakers.token_index": report.token_index,
    }


def _known(attributes: Attributes) -> Mapping[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
