"""Keys, scopes and headers, in front of every route."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from circuit_breakers.api.access import (
    authenticate,
    check_model,
    require_admin,
    take_guard_request,
    tightened_by,
)
from circuit_breakers.api.errors import ApiError
from circuit_breakers.engine.session import GuardSession

from .governed_app import KEYS, attach, governed_app, key_table, policy_file


def add_whoami(app: FastAPI) -> None:
    """Routes that know nothing of keys, and one that is for admins."""

    @app.post("/test/whoami")
    async def whoami(request: Request) -> Any:
        caller = authenticate(request)
        # As a route does that opens a session of its own.
        session = GuardSession()
        return {
            "id": caller.key_id,
            "policy": caller.policy.name if caller.policy else None,
            "judged_by": session.policy.name if session.policy else None,
        }

    @app.post("/v1/breaker/test")
    async def admin_only(request: Request) -> Any:
        return require_admin(request).key_id


def client_of(app: FastAPI) -> TestClient:
    add_whoami(app)
    return TestClient(app)


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    expired = key_table("gone", "expires = 2020-01-01T00:00:00Z")
    rotated = key_table("team", KEYS["team"], key="team-2")
    return governed_app(policy_file(tmp_path, expired, rotated))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    attach(app)
    with client_of(app) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [bearer("team"), {"Authorization": "bearer team"}, {"api-key": "team"}, {"x-api-key": "team"}],
)
def test_a_key_is_taken_from_the_header_of_each_client(
    client: TestClient, headers: dict[str, str]
) -> None:
    answer = client.post("/test/whoami", headers=headers)
    assert answer.json() == {"id": "team", "policy": "strict", "judged_by": "strict"}


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "got no API key"),
        (bearer(""), "got no API key"),
        (bearer("unknown"), "does not know"),
        (bearer("gone"), "has expired"),
        ({"Authorization": "Basic team"}, "is no 'Bearer KEY'"),
        ({"Authorization": "team"}, "is no 'Bearer KEY'"),
        (bearer("team") | {"api-key": "ops"}, "got several"),
    ],
)
def test_without_a_valid_key_there_is_a_401_in_openai_shape(
    client: TestClient, headers: dict[str, str], message: str
) -> None:
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/breaker"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/breaker/reload"),
        ("GET", "/no/such/route"),
        ("GET", "/livez/"),
        ("GET", "//livez"),
        ("GET", "/LIVEZ"),
    ):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert message in error["message"]


def test_a_websocket_without_a_key_is_closed(client: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as caught,
        client.websocket_connect("/v1/realtime"),
    ):
        pass
    assert caught.value.code == 1008


def test_who_is_not_let_in_is_counted_by_reason(client: TestClient) -> None:
    def refusals() -> dict[str, float]:
        found = re.findall(
            r'^circuit_breakers_refused_requests_total\{reason="(\w+)"\} (\S+)',
            client.get("/metrics").text,
            re.MULTILINE,
        )
        return {reason: float(count) for reason, count in found if float(count)}

    assert refusals() == {}
    client.get("/v1/models")
    client.get("/v1/models", headers=bearer("nobody"))
    assert refusals() == {"unauthenticated": 2}
    # A key that may infer, on a route for operators; then one for operators, that may not infer.
    assert client.get("/v1/breaker/trips", headers=bearer("team")).status_code == 403
    assert client.post("/v1/completions", headers=bearer("ops")).status_code == 403
    assert refusals() == {"unauthenticated": 2, "forbidden": 2}


def test_probes_and_metrics_are_open(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200


def test_metrics_can_want_a_key(tmp_path: Path) -> None:
    file = policy_file(tmp_path)
    file.write_text('metrics = "key"\n' + file.read_text())
    with TestClient(governed_app(file)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/livez").status_code == 200


def test_two_keys_of_one_id_are_one_caller(client: TestClient) -> None:
    for key in ("team", "team-2"):
        assert client.post("/test/whoami", headers=bearer(key)).json()["id"] == "team"


def test_admin_and_inference_are_apart(client: TestClient) -> None:
    refused = client.post("/v1/breaker/test", headers=bearer("team"))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_permissions"
    assert client.post("/v1/breaker/test", headers=bearer("ops")).json() == "ops"
    for path in ("/test/whoami", "/v1/chat/completions", "/v1/models/../completions"):
        assert client.post(path, headers=bearer("ops")).status_code == 403
    assert client.get("/v1/breaker", headers=bearer("ops")).status_code == 200


def test_a_key_sees_and_uses_its_models_only(client: TestClient) -> None:
    assert client.get("/v1/models", headers=bearer("bound")).json()["data"] == []
    names = [m["id"] for m in client.get("/v1/models", headers=bearer("team")).json()["data"]]
    assert names == ["m"]

    class Bound:
        models = frozenset({"other"})

        def may_use(self, model: str) -> bool:
            return model in self.models

    caller: Any = Bound()
    check_model(caller, "other")
    with pytest.raises(ApiError, match="'m' does not exist or is not for this key") as caught:
        check_model(caller, "m")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_the_header_tightens_and_never_loosens(client: TestClient) -> None:
    def ask(key: str, policy: str) -> Any:
        headers = bearer(key) | {"X-Breaker-Policy": policy}
        return client.post("/test/whoami", headers=headers)

    answer = ask("bound", "strict").json()
    assert (answer["policy"], answer["judged_by"]) == ("strict", "strict")
    for key, policy, message in (
        ("bound", "lax", "mode observe would stop nothing"),
        ("team", "standard", "threshold 4 of probe p0 is above yours, 1"),
        ("team", "nobody", "does not have"),
        ("team", "", "does not have"),
    ):
        refused = ask(key, policy)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("policy_not_allowed", "X-Breaker-Policy")
        assert message in error["message"]
    twice = [*bearer("team").items(), ("X-Breaker-Policy", "strict"), ("X-Breaker-Policy", "lax")]
    assert client.post("/test/whoami", headers=twice).status_code == 400


def test_the_field_tightens_what_the_header_left(client: TestClient, app: FastAPI) -> None:
    scope = {
        "type": "http",
        "app": app,
        "headers": [(b"authorization", b"Bearer bound"), (b"x-breaker-policy", b"strict")],
    }
    caller = authenticate(Request(scope))
    data: dict[str, Any] = {"model": "m", "guard": {"threshold": 0.5}}
    served = tightened_by(caller, take_guard_request(data))
    assert data == {"model": "m"}, "vLLM does not see the field"
    assert served.policy.threshold_K.tolist() == [0.5, 0.5]
    assert served.name == "strict", "metrics know names of the file only"
    assert take_guard_request({"guard": None}) is None
    assert tightened_by(caller, None) is caller.policy
    assert tightened_by(caller, take_guard_request({"guard": {"token_scores": True}})) == (
        caller.policy
    )
    for value in ({"threshold": 2}, {"policy": "standard"}, {"x": 1}, 5, [], "strict"):
        with pytest.raises(ApiError) as caught:
            tightened_by(caller, take_guard_request({"guard": value}))
        assert (caught.value.status, caught.value.param) == (400, "guard")


def test_without_a_file_everybody_is_anonymous_and_nobody_an_admin() -> None:
    app = governed_app(None)
    attach(app)
    with client_of(app) as client:
        for headers in ({}, bearer("none"), {"Authorization": "Basic x"}):
            answer = client.post("/test/whoami", headers=headers).json()
            assert answer == {"id": "anonymous", "policy": "default", "judged_by": "default"}
        for path in ("/v1/breaker/test", "/v1/breaker/reload"):
            refused = client.post(path)
            assert refused.status_code == 403
            assert "give one in the policy file" in refused.json()["error"]["message"]
        assert client.post("/test/whoami", headers={"X-Breaker-Policy": "x"}).status_code == 400


CONSOLE = {"id": "console", "policy": "default", "judged_by": "default"}
ANONYMOUS = CONSOLE | {"id": "anonymous"}


def test_the_consoles_key_makes_nobody_else_need_one() -> None:
    app = governed_app(None, console=True)
    attach(app)
    key = app.state.service.governance.rules.console.tell()
    with client_of(app) as client:
        for headers in (bearer(key), {"api-key": key}, {"x-api-key": key}):
            assert client.post("/test/whoami", headers=headers).json() == CONSOLE
            assert client.post("/v1/breaker/test", headers=headers).json() == "console"
        # As without the key: whatever a client sends to a server that wants none.
        for headers in (
            {},
            bearer("none"),
            bearer(key[:-1]),
            {"Authorization": "Basic x"},
            bearer("none") | {"api-key": "other"},
        ):
            assert client.post("/test/whoami", headers=headers).json() == ANONYMOUS
            refused = client.post("/v1/breaker/test", headers=headers)
            assert refused.status_code == 403
            assert "the one that the server printed" in refused.json()["error"]["message"]


def test_the_consoles_key_stands_beside_those_of_a_file(tmp_path: Path) -> None:
    app = governed_app(policy_file(tmp_path), console=True)
    attach(app)
    key = app.state.service.governance.rules.console.tell()
    with client_of(app) as client:
        admin = {"id": "console", "policy": "standard", "judged_by": "standard"}
        assert client.post("/test/whoami", headers=bearer(key)).json() == admin
        assert client.post("/test/whoami", headers=bearer("team")).json()["id"] == "team"
        for headers in ({}, bearer("none"), bearer(key) | {"api-key": "team"}):
            assert client.post("/test/whoami", headers=headers).status_code == 401
        # The file is read again by that very key, which outlives it.
        answer = client.post("/v1/breaker/reload", headers=bearer(key))
        assert (answer.status_code, answer.json()["key_ids"]) == (200, ["bound", "ops", "team"])
        assert client.post("/test/whoami", headers=bearer(key)).json() == admin


def test_nobody_gets_past_before_the_policies_are_in_force(app: FastAPI) -> None:
    with client_of(app) as client:
        assert client.post("/test/whoami").status_code == 401
        early = client.post("/test/whoami", headers=bearer("team"))
        assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
        assert client.get("/livez").status_code == 200
    plain = governed_app(None)
    with client_of(plain) as client:
        answer = client.post("/test/whoami", headers={"X-Breaker-Policy": "strict"})
        assert answer.status_code == 503


def test_breaker_shows_a_caller_its_policy_and_an_admin_all(client: TestClient) -> None:
    team = client.get("/v1/breaker", headers=bearer("team")).json()
    assert (team["policy"], team["action"], team["judged"]) == ("strict", "stop", ["p0", "p1"])
    assert [p["threshold_logit"] for p in team["probes"]] == [1.0, 1.0]
    # Nobody measured what a threshold of the operator's own promises.
    assert team["operating_point"] is None
    assert all("calibration" not in probe for probe in team["probes"])
    assert "policies" not in team
    ops = client.get("/v1/breaker", headers=bearer("ops")).json()
    assert ops["operating_point"]["target_fpr"] == 0.01
    assert [p["policy"] for p in ops["policies"]] == ["standard", "strict", "lax"]


def test_limits_of_a_key_hold_for_that_key_alone(tmp_path: Path) -> None:
    slow = key_table("slow", "limits = { requests_per_minute = 60, burst = 1 }")
    app = governed_app(policy_file(tmp_path, slow))
    attach(app)
    client = TestClient(app)

    def post(key: str) -> Any:
        # No JSON: answered behind the limits, without an engine.
        return client.post("/v1/chat/completions", content=b"x", headers=bearer(key))

    # Without limits of its own, a key has the server's: none.
    assert [post("team").status_code for _ in range(3)] == [post("team").status_code] * 3
    first, second = post("slow"), post("slow")
    assert first.status_code == post("team").status_code
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert second.headers["retry-after"] == "1"
    assert post("team").status_code != 429
