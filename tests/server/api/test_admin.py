"""The operators' routes: refused to everybody else, paged, filtered, and clear about bad input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.access import Caller, require_admin
from circuit_breakers.api.admin import ADMIN_ROUTES
from circuit_breakers.api.app import create_app
from circuit_breakers.api.trail import open_trail
from circuit_breakers.artifact import builtin_breaker_path, load_breaker
from circuit_breakers.audit.entry import now_us
from circuit_breakers.audit.store import AuditStore
from circuit_breakers.engine.guarded import GuardedEngine
from circuit_breakers.settings import ServeSettings

from ..audit.entries import trace, trip
from .conftest import MODEL

BREAKER = load_breaker(builtin_breaker_path(MODEL) or Path())
DAY_US = 86_400_000_000


def client_of(settings: ServeSettings, *, is_admin: bool = True) -> TestClient:
    """A client of an app whose engine only has to be there."""
    app = create_app(settings, CollectorRegistry())
    service = app.state.service
    service.trail = open_trail(settings, service.metrics)
    engine: Any = SimpleNamespace(errored=False)
    service.attach(SimpleNamespace(guarded=GuardedEngine(engine, BREAKER, "enforce", None, None)))
    service.ready()
    if is_admin:
        app.dependency_overrides[require_admin] = lambda: Caller(key_id="ops", is_admin=True)
    return TestClient(app)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    client = client_of(ServeSettings(audit_db=tmp_path / "audit.db", score_traces=True))
    yield client
    trail_of(client).close()


def trail_of(client: TestClient) -> Any:
    app: Any = client.app
    return app.state.service.trail


def store_of(client: TestClient) -> AuditStore:
    store: AuditStore = trail_of(client).writer.store
    return store


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("route", ADMIN_ROUTES)
def test_without_an_admin_key_nothing_is_told(tmp_path: Path, route: str) -> None:
    client = client_of(ServeSettings(audit_db=tmp_path / "audit.db"), is_admin=False)
    method, path = route.split()
    # Bad input is not even looked at.
    for query in ("", "?limit=x&threshold=0"):
        assert client.request(method, path + query).status_code in (401, 403)
    trail_of(client).close()


def test_trips_come_in_pages_newest_first(client: TestClient) -> None:
    entries = [trip(token_index=i) for i in range(5)]
    store_of(client).append(entries)
    seen: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 2}
    for _ in range(3):
        page = client.get("/v1/breaker/trips", params=query).json()
        seen += page["data"]
        query["cursor"] = page["next_cursor"]
    assert (page["has_more"], page["next_cursor"]) == (False, None)
    assert [row["id"] for row in seen] == [entry.entry_id for entry in reversed(entries)]
    assert (
        seen[0]
        | {
            "object": "breaker.trip",
            "action": "stopped",
            "request_id": "chatcmpl-1",
            "phase": "completion",
            "score": 1.25,
            "threshold": 1.0,
            "token_index": 4,
        }
        == seen[0]
    )
    age = datetime.now(UTC) - datetime.fromisoformat(seen[0]["time"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_who_reads_is_in_the_servers_log_and_not_in_what_is_read(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="circuit_breakers"):
        for path in ("/v1/breaker/trips", "/v1/breaker/what-if?threshold=0"):
            assert client.get(path).status_code == 200
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("admin read")]
    assert [line.split(" key_id=")[0] for line in said] == [
        "admin read: path=/v1/breaker/trips",
        "admin read: path=/v1/breaker/what-if",
    ]
    assert all(re.search(r" key_id=\w+$", line) for line in said)
    assert trail_of(client).writer.drain(20)
    assert [row["action"] for row in store_of(client).rows()] == ["created", "started"]


def test_trips_are_filtered(client: TestClient) -> None:
    store_of(client).append(
        [
            trip(time_us=1_000_000, key_id="a", token_index=1),
            trip(time_us=2_000_000, key_id="b", phase="prompt", token_index=2),
            trip(time_us=3_000_001, policy="strict", probe="q", token_index=3),
        ]
    )
    for query, expected in (
        ({}, [3, 2, 1]),
        ({"key": "a"}, [1]),
        ({"phase": "prompt"}, [2]),
        ({"policy": "strict", "probe": "q"}, [3]),
        ({"since": "1970-01-01T00:00:02Z"}, [3, 2]),
        ({"since": "1970-01-01T01:00:02+01:00"}, [3, 2]),
        ({"until": "1970-01-01T00:00:03.000001Z"}, [2, 1]),
        ({"key": "nobody"}, []),
    ):
        page = client.get("/v1/breaker/trips", params=query).json()
        assert [row["token_index"] for row in page["data"]] == expected, query


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("cursor=x", "cursor"),
        ("cursor=9223372036854775808", "cursor"),
        ("phase=both", "phase"),
        ("since=yesterday", "since"),
        ("since=2026-01-01T00:00:00", "since"),
        ("keys=a", "keys"),
        ("key=a&key=b", "key"),
        ("key=", "key"),
        ("key=a%00", "key"),
    ],
)
def test_a_bad_query_is_named(client: TestClient, query: str, param: str) -> None:
    assert error_of(client.get(f"/v1/breaker/trips?{query}"), 400)["param"] == param


def test_what_if_counts_traces_of_the_live_breaker(client: TestClient) -> None:
    probe = BREAKER.manifest.probes[0]
    store_of(client).add_traces(
        [
            trace(breaker=BREAKER.digest, peaks={"prompt": {probe.name: peak}})
            for peak in (0.0, 5.0, 100.0)
        ]
        + [trace(breaker="another", peaks={"prompt": {probe.name: 100.0}})]
        + [trace(breaker=BREAKER.digest, time_us=now_us() - 8 * DAY_US)]
    )
    body = client.get("/v1/breaker/what-if", params={"threshold": "4.5"}).json()
    prompt, completion, both = body["data"]
    assert (prompt["num_requests"], prompt["num_would_trip"]) == (3, 2)
    assert (completion["num_would_trip"], both["num_would_trip"]) == (0, 2)
    assert prompt["share_low"] < 2 / 3 < prompt["share_high"]
    assert body["thresholds"] == {p.name: 4.5 for p in BREAKER.manifest.probes}
    assert body["is_complete"] and body["notes"]
    wider = client.get("/v1/breaker/what-if", params={"threshold": "4.5", "days": 30}).json()
    assert wider["data"][0]["num_requests"] == 4


def test_what_if_takes_thresholds_from_the_calibration(client: TestClient) -> None:
    promise = BREAKER.manifest.probes[0].calibration
    body = client.get("/v1/breaker/what-if", params={"target_fpr": promise.fpr_upper_bound}).json()
    expected = {p.name: p.threshold_logit for p in BREAKER.manifest.probes}
    assert body["thresholds"] == expected
    error = error_of(client.get("/v1/breaker/what-if", params={"target_fpr": 1e-9}), 400)
    assert error["param"] == "target_fpr"


@pytest.mark.parametrize("query", ["", "threshold=1&target_fpr=0.1", "threshold=nan", "days=0"])
def test_what_if_asks_for_exactly_one_finite_threshold(client: TestClient, query: str) -> None:
    error_of(client.get(f"/v1/breaker/what-if?{query}"), 400)


def test_a_server_without_a_log_says_how_to_keep_one() -> None:
    client = client_of(ServeSettings())
    assert "--audit-db" in error_of(client.get("/v1/breaker/trips"), 404)["message"]
    error = error_of(client.get("/v1/breaker/what-if?threshold=1"), 404)
    assert "--score-traces" in error["message"]


def test_a_database_that_is_away_is_503_and_is_not_described(tmp_path: Path) -> None:
    database = tmp_path / "audit.db"
    database.mkdir()
    client = client_of(ServeSettings(audit_db=database))
    response = client.get("/v1/breaker/trips")
    assert str(tmp_path) not in error_of(response, 503)["message"]
    assert response.headers["retry-after"] == "5"
    database.rmdir()
    trail_of(client).close()


def test_the_description_lists_every_parameter(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    trips = {p["name"] for p in paths["/v1/breaker/trips"]["get"]["parameters"]}
    assert trips == {"limit", "cursor", "since", "until", "key", "policy", "phase", "probe"}
    what_if = {p["name"] for p in paths["/v1/breaker/what-if"]["get"]["parameters"]}
    assert what_if == {"threshold", "target_fpr", "days"}
