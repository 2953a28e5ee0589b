"""The closed list of routes, and what the server says of itself."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.settings import ServeSettings

from .conftest import MAX_MODEL_LEN, MODEL, Server

SERVED = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/moderations",
    "/v1/models",
    "/v1/models/{model}",
    "/v1/breaker",
    "/v1/breaker/trips",
    "/v1/breaker/what-if",
    "/v1/breaker/reload",
    "/metrics",
    "/livez",
    "/readyz",
    "/openapi.json",
    "/console",
    "/console/assets/console.css",
    "/console/assets/console.js",
}


def vllm_routes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every path that vLLM's own server could answer, its development routes included."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.tasks import GENERATION_TASKS, POOLING_TASKS
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(arguments, (*GENERATION_TASKS, *POOLING_TASKS), None)
    return {getattr(route, "path", "") for route in app.routes} - {""}


def test_no_route_of_vllm_is_served_but_those_that_are_listed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = vllm_routes(monkeypatch)
    assert len(paths) > 40 and "/pause" in paths and "/collective_rpc" in paths
    for path in sorted(paths - SERVED):
        for method in ("GET", "POST"):
            response = server.http.request(method, path)
            assert response.status_code == 404, (method, path)
            assert response.json()["error"]["code"] == "unknown_route"


def test_openapi_lists_the_served_routes_only(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert set(paths) == SERVED - {"/openapi.json"}


def test_a_wrong_method_is_refused_in_openai_shape(server: Server) -> None:
    response = server.http.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_lists_the_served_model_without_its_path(server: Server) -> None:
    (model,) = server.openai.models.list().data
    assert model.id == MODEL
    assert model.owned_by == "circuit-breakers"
    assert model.model_extra == {"max_model_len": MAX_MODEL_LEN}


def test_breaker_tells_identity_thresholds_and_calibration(server: Server) -> None:
    breaker = server.http.get("/v1/breaker").json()
    assert (breaker["name"], breaker["mode"], breaker["policy"]) == ("words", "enforce", "default")
    assert len(breaker["digest"]) == 64
    assert breaker["base_model"]["id"] == MODEL
    assert [(p["name"], p["layer"]) for p in breaker["probes"]] == [("paris", 3), ("zebra", 12)]
    assert breaker["probes"][0]["calibration"]["num_conversations"] == 300
    assert breaker["operating_point"] == {
        "target_fpr": 0.01,
        "confidence": 0.95,
        "num_conversations": 300,
        "num_trips": 0,
        "fpr_upper_bound": 0.00994,
        "max_tokens": 256,
    }
    assert 0 <= breaker["calibration_age_s"] < 3600


def test_metrics_hold_the_engines_series_too(server: Server) -> None:
    metrics = server.metrics()
    assert any(name.startswith("vllm:num_requests_running") for name in metrics)
    (info,) = (name for name in metrics if name.startswith("circuit_breakers_breaker_info{"))
    assert f'base_model="{MODEL}"' in info
    assert metrics[info] == 1


def test_without_an_engine_only_the_probes_answer() -> None:
    app = create_app(ServeSettings(), CollectorRegistry())
    client = TestClient(app)
    assert client.get("/livez").json() == {"status": "live"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()) == (
        503,
        {"status": "not ready", "reason": "starting"},
    )
    assert "circuit_breakers_leaked_tokens_total 0.0" in client.get("/metrics").text
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/moderations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/breaker"),
    ):
        response = client.request(method, path)
        assert response.status_code == 503, path
        assert response.json()["error"]["code"] == "not_ready"
        assert response.headers["retry-after"] == "5"
    response = client.post("/v1/messages")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
