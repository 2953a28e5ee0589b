"""Where spans go wrong: no collector, none that answers, no OpenTelemetry. The rest needs a server.

What spans say is in test_observability.py.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from circuit_breakers.api.tracing import open_tracer
from circuit_breakers.errors import ConfigError
from circuit_breakers.settings import ServeSettings

from .test_lifecycle import scripted_process
from .test_logs import SUMMARY


@pytest.fixture(params=["gone", "stuck"])
def dead_collector(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL where nobody listens, or where connections are taken and never answered."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if request.param == "stuck":
            taken.listen()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_dead_collector_costs_no_request_and_no_shutdown(dead_collector: str) -> None:
    with scripted_process("--otlp-endpoint", dead_collector) as server:
        for _ in range(3):
            assert server.http.post("/v1/chat/completions", json={}).status_code == 200
        with server.stream(num_events=3) as response:
            assert list(filter(None, response.iter_lines()))[-1] == "data: [DONE]"
        server.process.send_signal(signal.SIGTERM)
        # Far less than the half a minute that the exporter would take by itself.
        assert server.process.wait(20) == 0


def test_without_an_endpoint_there_is_no_tracer() -> None:
    assert open_tracer(ServeSettings()) is None


@pytest.mark.parametrize(
    "url", ["localhost:4318", "grpc://collector:4317", "/v1/traces", "http://"]
)
def test_what_is_no_url_of_a_collector_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"got --otlp-endpoint .*e\.g\. http://localhost:4318"):
        open_tracer(ServeSettings(otlp_endpoint=url))


def test_without_opentelemetry_the_start_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'circuit-breakers\[otel\]'"):
        open_tracer(ServeSettings(otlp_endpoint="http://localhost:4318"))


def test_a_caller_cannot_switch_its_span_off() -> None:
    from .otlp_collector import collector

    for flags in ("00", "01"):
        with collector() as kept:
            tracer = open_tracer(ServeSettings(otlp_endpoint=kept.url))
            assert tracer is not None
            parent = f"00-{'a' * 32}-{'b' * 16}-{flags}"
            tracer.record(replace(SUMMARY, trace_headers={"traceparent": parent}))
            tracer.close()
            (span,) = kept.spans
            assert span.parent_id == "b" * 16


def test_the_path_of_traces_is_added_once_and_a_broken_parent_is_no_parent() -> None:
    from .otlp_collector import collector

    for path in ("", "/", "/v1/traces"):
        with collector() as kept:
            tracer = open_tracer(ServeSettings(otlp_endpoint=kept.url + path))
            assert tracer is not None
            tracer.record(SUMMARY)
            tracer.close()
            assert kept.paths == {"/v1/traces"}
            (span,) = kept.spans
            assert span.name == "chat m" and span.parent_id == ""
            assert span.attributes["error.type"] == "invalid_value"
