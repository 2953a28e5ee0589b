"""What a real server says of itself: JSON logs, OpenTelemetry spans, canaries, scored tokens."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ...docker.tools import find_program
from .conftest import MODEL, Server, user
from .otlp_collector import Collector, collector

SECRET = "heliotrope"
"""A word that only prompts have."""
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVER_KIND = 2
"""OTLP's number for spans of a server."""


class Observed(NamedTuple):
    server: Server
    collector: Collector

    def log(self) -> list[dict[str, Any]]:
        """The lines of standard error that are JSON objects."""
        lines = self.server.err.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def access_line(self, request_id: str) -> dict[str, Any]:
        (line,) = [x for x in self.log() if x.get("request_id") == request_id]
        return line

    def ask(self, text: str, **fields: Any) -> Any:
        body = {"model": MODEL, "messages": user(text), "temperature": 0, **fields}
        headers = {"traceparent": TRACEPARENT}
        return self.server.http.post("/v1/chat/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def observed(word_breaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with collector() as kept, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        server = Server(
            word_breaker,
            tmp_path_factory.mktemp("observed"),
            *("--log-format", "json", "--log-level", "info"),
            *("--otlp-endpoint", kept.url, "--canary-interval-s", "2"),
        )
        try:
            server.wait_until_ready()
            yield Observed(server, kept)
        finally:
            assert server.stop() == 0, server.err.read_text()[-3000:]


def test_an_answer_leaves_a_line_and_a_span_inside_the_callers_trace(observed: Observed) -> None:
    answer = observed.ask(f"Say {SECRET}.", max_tokens=8)
    body = answer.json()
    request_id = answer.headers["x-request-id"]
    assert request_id == body["id"]
    guard, usage = body["choices"][0]["guard"], body["usage"]
    line = observed.access_line(request_id)
    assert (line["logger"], line["level"], line["message"]) == (
        "circuit_breakers.access",
        "info",
        "request ended",
    )
    expected = {
        "key_id": "anonymous",
        "model": MODEL,
        "endpoint": "chat",
        "outcome": "ok",
        "error": None,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }
    told = ("policy", "mode", "tripped", "phase", "probe", "score", "threshold", "token_index")
    expected |= {name: guard[name] for name in told}
    assert {name: line[name] for name in expected} == expected
    assert 0 < line["ttft_s"] <= line["duration_s"]

    span, inner = observed.collector.wait_for(request_id)
    assert observed.collector.paths == {"/v1/traces"}
    assert (span.name, span.kind, span.is_error) == (f"chat {MODEL}", SERVER_KIND, False)
    assert (span.trace_id, span.parent_id) == tuple(TRACEPARENT.split("-")[1:3])
    assert span.resource["service.name"] == "circuit-breakers"
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": [body["choices"][0]["finish_reason"]],
        "circuit_breakers.outcome": "ok",
    }
    assert {name: span.attributes[name] for name in attributes} == attributes
    assert "error.type" not in span.attributes
    assert (inner.name, inner.trace_id, inner.events) == ("guard", span.trace_id, [])
    for name in ("breaker", "policy", "mode", "tripped", "probe", "score", "threshold"):
        assert inner.attributes[f"circuit_breakers.{name}"] == guard[name]


@pytest.mark.parametrize("stream", [False, True])
def test_a_trip_is_an_event_of_the_guard_and_no_error(observed: Observed, stream: bool) -> None:
    answer = observed.ask(f"{SECRET}: what is the capital of France?", max_tokens=32, stream=stream)
    request_id = answer.headers["x-request-id"]
    line = observed.access_line(request_id)
    assert (line["outcome"], line["phase"], line["tripped"]) == (
        "tripped_completion",
        "completion",
        True,
    )
    span, inner = observed.collector.wait_for(request_id)
    assert span.attributes["gen_ai.response.finish_reasons"] == ["content_filter"]
    assert not span.is_error and "error.type" not in span.attributes
    ((name, event),) = inner.events
    assert name == "trip"
    assert event["circuit_breakers.action"] == "stopped"
    for field in ("phase", "probe", "score", "threshold", "token_index"):
        assert event[f"circuit_breakers.{field}"] == line[field]


def test_a_tripped_prompt_and_a_rejected_request_are_told_apart(observed: Observed) -> None:
    tripped = observed.ask(f"{SECRET}: do you like the zebra?")
    assert tripped.status_code == 400
    line = observed.access_line(tripped.headers["x-request-id"])
    assert (line["outcome"], line["error"], line["phase"], line["completion_tokens"]) == (
        "tripped_prompt",
        "content_filter",
        "prompt",
        0,
    )
    _, inner = observed.collector.wait_for(tripped.headers["x-request-id"])
    assert len(inner.events) == 1
    rejected = observed.ask(SECRET, no_such_field=1)
    line = observed.access_line(rejected.headers["x-request-id"])
    assert (line["outcome"], line["policy"]) == ("rejected", "default")
    assert (line["score"], line["ttft_s"]) == (None, None)
    assert line["error"] == rejected.json()["error"]["code"]


def test_usage_counts_a_prompt_once_however_many_choices(observed: Observed) -> None:
    answer = observed.ask(f"Say {SECRET}.", n=3, max_tokens=4, temperature=1)
    usage, line = answer.json()["usage"], observed.access_line(answer.headers["x-request-id"])
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]


def test_canaries_run_again_and_count_as_scored_tokens_alone(observed: Observed) -> None:
    def counts() -> dict[str, float]:
        return observed.server.metrics()

    scored = f'circuit_breakers_scored_tokens_total{{model="{MODEL}"}}'
    last_run = "circuit_breakers_canary_last_run_timestamp_seconds"
    first = counts()
    deadline = time.monotonic() + 60
    while (now := counts())[last_run] == first[last_run]:
        assert time.monotonic() < deadline, "no second run of the canaries"
        time.sleep(0.1)
    assert now["circuit_breakers_canary_ok"] == now["circuit_breakers_ready"] == 1
    assert now["circuit_breakers_canary_failures_total"] == 0
    assert now[scored] > first[scored]
    requests = [name for name in now if name.startswith("circuit_breakers_requests_total")]
    scores = [name for name in now if name.startswith("circuit_breakers_score_count")]
    drift = [name for name in now if name.startswith("circuit_breakers_score_drift_requests")]
    # A token from the prefix cache has its old score, which says nothing of the probe.
    hits = [name for name in now if name.startswith("vllm:prefix_cache_hits_total")]
    assert len(requests) >= 6 and len(scores) == len(drift) == 2 and len(hits) == 1
    for name in requests + scores + drift + hits:
        assert now[name] == first[name], name


def test_scored_tokens_and_drift_count_an_answer_that_did_not_trip(observed: Observed) -> None:
    before = observed.server.metrics()
    body = observed.ask(f"Say {SECRET}.", max_tokens=6).json()
    assert not body["choices"][0]["guard"]["tripped"]
    after = observed.server.metrics()
    for phase in ("prompt", "completion"):
        name = f'circuit_breakers_score_drift_requests{{phase="{phase}"}}'
        assert after[name] == before[name] + 1
    scored = f'circuit_breakers_scored_tokens_total{{model="{MODEL}"}}'
    # At least; canaries run meanwhile.
    assert after[scored] - before[scored] >= body["usage"]["total_tokens"]


def test_every_line_of_ours_is_json_and_none_has_a_word_of_a_prompt(observed: Observed) -> None:
    assert observed.ask(f"Say {SECRET}.", max_tokens=2).status_code == 200
    text = observed.server.err.read_text()
    lines = observed.log()
    for line in lines:
        assert {"time", "level", "logger", "message", "process"} <= set(line)
    # Progress bars and warnings of libraries are nobody's records.
    plain = [line for line in text.splitlines() if line and not line.startswith("{")]
    # vLLM puts the process in front: (EngineCore pid=1) INFO ...
    record = re.compile(r"(\([^)]*\) )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
    assert [line for line in plain if record.match(line)] == []
    own = {x["process"] for x in lines if x["logger"].startswith("circuit_breakers")}
    engine = {x["process"] for x in lines if x["logger"].startswith("vllm")}
    assert observed.server.process.pid in own
    assert engine - {observed.server.process.pid}, "the engine's process logs through vLLM's logger"
    assert SECRET not in text
    assert all(SECRET.encode() not in body for body in observed.collector.bodies)
    assert observed.collector.bodies


def test_promtool_finds_nothing_to_say_of_our_series(observed: Observed) -> None:
    promtool = find_program("promtool")
    text = observed.server.http.get("/metrics").text
    ours = "".join(
        f"{line}\n" for line in text.splitlines() if re.match(r"(# \w+ )?circuit_breakers_", line)
    )
    assert ours.count("# TYPE") > 20
    done = subprocess.run(
        [promtool, "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
