"""vLLM's batch of chats keeps keys, policies and limits, or refuses; vLLM itself is a stub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.access import OPEN_PATHS, AccessGate
from circuit_breakers.api.endpoint_plugin import RouteGate
from circuit_breakers.api.service import Service
from circuit_breakers.engine.session import current_session
from circuit_breakers.settings import ServeSettings

from .governed_app import POLICIES, attach, key_table, policy_file

PATH = "/v1/chat/completions/batch"
MORE_POLICIES = """
[policies.refusing]
action = "refuse"
[policies.failing]
action = "error"
"""
CONVERSATION = [{"role": "user", "content": "x"}]


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    """The gates of the drop-in in front of a stub of vLLM's route."""
    slow = key_table("slow", "limits = { requests_per_minute = 1, burst = 1 }")
    file = policy_file(tmp_path, slow, policies=POLICIES + MORE_POLICIES)
    settings = ServeSettings(
        policies=file,
        pepper_file=file.with_name("pepper"),
        max_choices=2,
        max_body_bytes=1024,
        request_timeout_s=1,
    )
    app = FastAPI()
    app.state.service = service = Service(settings, CollectorRegistry())

    @app.post(PATH)
    async def batch(request: Request) -> Any:
        body = await request.json()
        while body.get("user") == "leaves":
            # As vLLM does, which then answers nobody.
            if (await request.receive())["type"] == "http.disconnect":
                return None
        session = current_session()
        assert session is not None
        if body.get("user") == "waits":
            session.request_ids.append("r")
            await asyncio.sleep(30)
        policy = session.policy
        inside = service.admission.num_running
        return {"got": body, "policy": policy.name if policy else None, "running": inside}

    app.add_middleware(RouteGate, service=service)
    app.add_middleware(AccessGate, service=service, open_paths=OPEN_PATHS)
    attach(app)
    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def ask(client: TestClient, key: str, policy: str | None = None, **body: Any) -> httpx.Response:
    headers = {"x-api-key": key} | ({"X-Breaker-Policy": policy} if policy else {})
    answer = client.post(PATH, json={"messages": [CONVERSATION]} | body, headers=headers)
    assert answer.headers["x-request-id"].startswith("req-")
    return answer


def code_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    code: str = answer.json()["error"]["code"]
    return code


def outcomes(app: FastAPI) -> dict[str, float]:
    (family,) = [
        f for f in app.state.service.registry.collect() if f.name == "circuit_breakers_requests"
    ]
    found: dict[str, float] = {}
    for sample in family.samples:
        if sample.name.endswith("_total") and sample.value:
            outcome = sample.labels["outcome"]
            found[outcome] = found.get(outcome, 0) + sample.value
    return found


def test_a_batch_runs_in_a_place_under_the_policy_of_its_caller(
    client: TestClient, app: FastAPI
) -> None:
    answer = ask(client, "team").json()
    assert answer == {"got": {"messages": [CONVERSATION]}, "policy": "strict", "running": 1}
    assert app.state.service.admission.num_inside == 0
    assert outcomes(app) == {"ok": 1}


def test_a_key_of_another_model_has_no_batch(client: TestClient, app: FastAPI) -> None:
    assert code_of(ask(client, "bound"), 404) == "model_not_found"
    assert outcomes(app) == {"rejected": 1}


@pytest.mark.parametrize("policy", ["refusing", "failing"])
def test_an_action_that_would_show_the_text_up_to_a_trip_is_refused(
    client: TestClient, policy: str
) -> None:
    assert code_of(ask(client, "slow", policy), 400) == "unsupported_action"


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ({"guard": {"threshold": -5.0}}, "unsupported_parameter"),
        ({"moderation": {"model": "b"}}, "unsupported_parameter"),
        ({"messages": [CONVERSATION] * 3}, "invalid_value"),
    ],
)
def test_what_vllm_would_pass_over_is_refused(
    client: TestClient, app: FastAPI, field: dict[str, Any], code: str
) -> None:
    assert code_of(ask(client, "team", **field), 400) == code
    assert app.state.service.admission.num_inside == 0
    assert outcomes(app) == {"rejected": 1}


def test_a_batch_has_the_limits_of_its_key(client: TestClient, app: FastAPI) -> None:
    first = ask(client, "slow")
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert code_of(ask(client, "slow"), 429) == "rate_limit_exceeded"
    assert code_of(ask(client, "team", user="x" * 2000), 413) == "request_too_large"
    app.state.service.admission.close()
    assert code_of(ask(client, "team"), 503) == "shutting_down"
    assert outcomes(app) == {"ok": 1, "rejected": 2, "error": 1}


def test_a_client_that_goes_away_is_no_answer(app: FastAPI) -> None:
    raw = json.dumps({"messages": [CONVERSATION], "user": "leaves"}).encode()
    received = iter(
        [
            {"type": "http.request", "body": raw[:9], "more_body": True},
            {"type": "http.request", "body": raw[9:], "more_body": False},
            {"type": "http.disconnect"},
        ]
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": PATH,
        "query_string": b"",
        "headers": [(b"x-api-key", b"team"), (b"content-type", b"application/json")],
    }

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        """Nobody reads it."""

    asyncio.run(app(scope, receive, send))
    assert outcomes(app) == {"aborted": 1}
    assert app.state.service.admission.num_inside == 0


def test_what_runs_too_long_is_ended_in_the_engine_too(client: TestClient, app: FastAPI) -> None:
    aborted: list[str] = []

    async def abort(request_id: str) -> None:
        aborted.append(request_id)

    service = app.state.service
    service.serving().guarded.abort = abort
    # What runs has to be ended all the same.
    Timer(0.3, setattr, (service, "failed_canary", "canary 0 passed")).start()
    assert code_of(ask(client, "team", user="waits"), 504) == "request_timeout"
    assert service.failed_canary
    assert aborted == ["r"]
    assert app.state.service.admission.num_inside == 0
    assert outcomes(app) == {"error": 1}
