"""From a request's end to the audit log, and from settings to a trail."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from circuit_breakers.api.accounting import RequestRecord
from circuit_breakers.api.trail import AuditTrail, open_trail
from circuit_breakers.artifact import load_breaker
from circuit_breakers.audit.store import AuditStore
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.engine.session import GuardSession
from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.metrics import GuardMetrics
from circuit_breakers.settings import ServeSettings

from .conftest import MODEL, Server, user
from .scripted import scripted_server
from .scripted_engine import EngineServing

GOLDEN = Path(__file__).parents[2] / "golden" / "breaker-v1"
DIGEST = "d" * 64
WAIT_S = 20


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> GuardMetrics:
    return GuardMetrics(registry, model="m")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def trail(database: Path, metrics: GuardMetrics) -> Iterator[AuditTrail]:
    trail = open_trail(ServeSettings(audit_db=database, score_traces=True), metrics)
    trail.begin(DIGEST, "breaker b, mode enforce")
    yield trail
    trail.close()


def session_with(*scores: list[float], stop_last: bool = False) -> GuardSession:
    """A session with a choice for each list of scores, the first 2 of which are the prompt's.

    Thresholds are the golden breaker's; every probe sees the same logits.
    """
    policy = Policy.from_manifest(load_breaker(GOLDEN).manifest, "enforce")
    session = GuardSession()
    for choice, logits in enumerate(scores):
        stream = session.stream(policy, choice, num_prompt_tokens=2)
        logit_TK = np.repeat(np.array(logits, np.float32)[:, None], len(policy.probes), axis=1)
        stream.breaker.update(logit_TK)
    stream.stopped = stop_last
    return session


def written(trail: AuditTrail, database: Path, table: str) -> list[dict[str, Any]]:
    assert trail.writer is not None and trail.writer.drain(WAIT_S)
    with sqlite3.connect(database) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY 1")]
    db.close()
    return rows


def finished(trail: AuditTrail, metrics: GuardMetrics, session: GuardSession) -> RequestRecord:
    record = RequestRecord(metrics, trail, model="m")
    record.session = session
    record.key_id = "team-a"
    record.complete(None)
    return record


def test_a_trip_is_written_with_what_the_response_says(
    trail: AuditTrail, metrics: GuardMetrics, database: Path
) -> None:
    session = session_with([-9.0] * 4, [-9.0, -9.0, 50.0])
    record = finished(trail, metrics, session)
    created, started, row = written(trail, database, "audit_log")
    assert (created["kind"], started["action"]) == ("checkpoint", "started")
    report = session.reports()[1]
    assert (
        row
        | {
            "kind": "trip",
            "action": "stopped",
            "request_id": record.request_id,
            "key_id": "team-a",
            "model": "m",
            "policy": "default",
            "breaker": DIGEST,
            "phase": "completion",
            "probe": report.probe,
            "score": report.score,
            "threshold": report.threshold,
            "token_index": 2,
            "choice": 1,
            "detail": None,
        }
        == row
    )
    assert abs(row["time_us"] / 1e6 - time.time()) < 60


def test_a_refused_prompt_is_one_trip_however_many_choices(
    trail: AuditTrail, metrics: GuardMetrics, database: Path
) -> None:
    record = RequestRecord(metrics, trail, model="m")
    record.session = session_with([-9.0, 50.0], [-9.0, 50.0], stop_last=True)
    record.finish("tripped_prompt")
    record.finish("aborted")
    trips = [row for row in written(trail, database, "audit_log") if row["kind"] == "trip"]
    assert [(row["phase"], row["choice"], row["token_index"]) for row in trips] == [
        ("prompt", None, 1)
    ]


def test_a_choice_that_has_ended_is_logged_before_the_others_end(
    trail: AuditTrail, metrics: GuardMetrics, database: Path
) -> None:
    """Its client is told of its trip while they run on."""
    session = session_with([-9.0, -9.0, 50.0], [-9.0, -9.0, -9.0])
    stopped, running = (session.stream_for(choice) for choice in (0, 1))
    assert stopped is not None and running is not None
    record = RequestRecord(metrics, trail, model="m")
    record.session = session
    stopped.finish_reason = "content_filter"
    asyncio.run(record.settle())
    assert [row["choice"] for row in trips_in(trail, database)] == [0]
    running.breaker.update(np.full((1, len(running.policy.probes)), 50.0, np.float32))
    record.complete(None)
    asyncio.run(record.settle())
    assert [row["choice"] for row in trips_in(trail, database)] == [0, 1]


def trips_in(trail: AuditTrail, database: Path) -> list[dict[str, Any]]:
    return [row for row in written(trail, database, "audit_log") if row["kind"] == "trip"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_is_told_of_a_trip_once_the_disk_has_it(
    database: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """What a client knows is in the log after a kill -9."""
    monkeypatch.setattr("circuit_breakers.api.trail._WRITTEN_S", 60.0)

    async def test() -> None:
        async with scripted_server(EngineServing()) as server:
            trail = open_trail(ServeSettings(audit_db=database), server.service.metrics)
            trail.begin(DIGEST, "breaker b, mode enforce")
            writer = trail.writer
            assert writer is not None and writer.sync(WAIT_S)
            server.service.trail = trail
            said: list[str] = []

            async def listen() -> None:
                script = {"num_events": 4, "trips_at": 2, "stream": stream}
                asked = server.http.stream("POST", "/v1/chat/completions", json=script)
                async with asked as response:
                    async for text in response.aiter_text():
                        said.append(text)

            with writer._intake:  # a disk that takes its time
                listening = asyncio.create_task(listen())
                while not writer._entries:
                    await asyncio.sleep(0.01)
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(listening), 0.1)
                assert "content_filter" not in "".join(said)
            await listening
            assert "content_filter" in "".join(said)
            await asyncio.to_thread(trail.close)

    asyncio.run(test())


def test_a_disk_that_hangs_holds_no_answer_for_ever(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuit_breakers.api.trail._WRITTEN_S", 0.01)

    async def test() -> None:
        async with scripted_server(EngineServing()) as server:
            trail = open_trail(ServeSettings(audit_db=database), server.service.metrics)
            trail.begin(DIGEST, "breaker b, mode enforce")
            assert trail.writer is not None
            server.service.trail = trail
            with trail.writer._intake:
                answer = await server.post(num_events=4, trips_at=2)
            assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
            await asyncio.to_thread(trail.close)

    asyncio.run(test())


def test_a_trace_has_the_highest_scores_of_all_choices(
    trail: AuditTrail, metrics: GuardMetrics, database: Path
) -> None:
    session = session_with([-9.0, -8.0, -7.0], [-9.0, -8.5, -6.0, -6.5])
    record = finished(trail, metrics, session)
    (row,) = written(trail, database, "score_traces")
    store = AuditStore(f"sqlite:///{database}")
    (trace,) = store.traces(0)
    store.close()
    assert (trace.request_id, trace.tripped, trace.stopped) == (record.request_id, None, False)
    assert trace.num_tokens == 3 + 4
    assert trace.peaks == session.probe_peaks
    assert {phase: max(by.values()) for phase, by in trace.peaks.items()} == session.max_scores
    policy = Policy.from_manifest(load_breaker(GOLDEN).manifest, "enforce")
    assert trace.thresholds == pytest.approx({p.name: p.threshold_logit for p in policy.probes})
    assert "text" not in row and "messages" not in row


def test_an_act_of_an_operator_is_written(trail: AuditTrail, database: Path) -> None:
    trail.record_admin("reload", key_id="ops", detail="policies.toml 0123abcd")
    row = written(trail, database, "audit_log")[-1]
    assert (row["kind"], row["action"], row["key_id"]) == ("admin", "reload", "ops")
    assert row["detail"] == "policies.toml 0123abcd"


def test_without_a_log_nothing_is_written_and_nothing_fails(
    metrics: GuardMetrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trail = open_trail(ServeSettings(), metrics)
    trail.begin(DIGEST, "x")
    finished(trail, metrics, session_with([50.0, 50.0]))
    trail.record_admin("reload", key_id="ops")
    trail.close()
    assert trail.writer is None
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_does_not_answer_is_no_reason_not_to_serve(
    metrics: GuardMetrics, registry: CollectorRegistry, database: Path, tmp_path: Path
) -> None:
    database.mkdir()  # no file can be opened there
    trail = open_trail(ServeSettings(audit_db=database), metrics)
    trail.begin(DIGEST, "x")
    finished(trail, metrics, session_with([50.0, 50.0]))
    assert trail.writer is not None and trail.writer.sync(WAIT_S)
    # The start and the trip.
    assert registry.get_sample_value("circuit_breakers_audit_spooled") == 2
    assert registry.get_sample_value("circuit_breakers_audit_dropped_total") == 0
    database.rmdir()
    trail.close()
    store = AuditStore(f"sqlite:///{database}")
    found = verify_rows(store.rows())
    store.close()
    assert (found.findings, found.num_rows) == ((), 3)
    assert registry.get_sample_value("circuit_breakers_audit_spooled") == 0
    assert registry.get_sample_value("circuit_breakers_audit_sequence") == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"audit_db": "a.db", "audit_url": "sqlite:///b.db"}, "one of them"),
        ({"audit_url": "mysql://u:hidden@h/d"}, "expected sqlite:///PATH or postgresql"),
        ({"score_traces": True}, "score_traces without an audit log"),
        ({"audit_spool": "s", "audit_key_file": "k"}, "audit_spool, audit_key_file without"),
        ({"audit_db": "none/a.db"}, "no folder 'none'"),
        ({"audit_db": "a.db", "audit_key_file": "none"}, "audit key file none: No such file"),
        ({"audit_db": "a.db", "audit_spool": "/dev/null/s"}, "--audit-spool"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(
    metrics: GuardMetrics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        open_trail(ServeSettings(**settings), metrics)
    assert "hidden" not in str(error.value)


def test_postgresql_needs_a_spool_of_its_own(
    metrics: GuardMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    settings = ServeSettings(audit_url="postgresql://u:hidden@127.0.0.1:1/d")  # type: ignore[arg-type]
    assert "hidden" not in repr(settings)
    with pytest.raises(ConfigError, match="--audit-spool"):
        open_trail(settings, metrics)


def wait_for_row(read: Callable[[], list[Any]]) -> list[Any]:
    deadline = time.monotonic() + WAIT_S
    while not (rows := read()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return rows


def test_a_servers_trips_are_found_by_the_id_of_their_response(server: Server) -> None:
    def rows(table: str, request_id: str) -> list[Any]:
        with sqlite3.connect(server.audit_db) as db:
            query = f"SELECT * FROM {table} WHERE request_id = ?"
            found = db.execute(query, (request_id,)).fetchall()
        db.close()
        return found

    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    refused = server.http.post(
        "/v1/chat/completions", json=fields | {"messages": user("Say zebra.")}
    )
    assert refused.status_code == 400
    refused_id = refused.headers["x-request-id"]
    assert refused_id.startswith("chatcmpl-")
    assert len(wait_for_row(lambda: rows("audit_log", refused_id))) == 1
    assert len(wait_for_row(lambda: rows("score_traces", refused_id))) == 1
    for streams in (False, True):
        passed = server.http.post(
            "/v1/completions", json=fields | {"prompt": "Rome is in", "stream": streams}
        )
        assert passed.status_code == 200
        passed_id = passed.headers["x-request-id"]
        assert f'"id":"{passed_id}"' in passed.text
        assert len(wait_for_row(lambda i=passed_id: rows("score_traces", i))) == 1
        assert rows("audit_log", passed_id) == []
    unparsed = server.http.post("/v1/chat/completions", json={})
    assert unparsed.headers["x-request-id"].startswith("req-")
    store = AuditStore(f"sqlite:///{server.audit_db}")
    assert verify_rows(store.rows()).findings == ()
    store.close()
