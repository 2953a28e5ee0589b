"""The plugin on an app of its own: what it puts in front of vLLM's routes, and what it refuses."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api import endpoint_plugin
from circuit_breakers.api.endpoint_plugin import EndpointPlugin
from circuit_breakers.engine.session import GuardSession
from circuit_breakers.errors import ConfigError

from ...vllm_release import needs_vllm_0_32
from .conftest import MODEL
from .governed_app import attach, policy_file

pytestmark = needs_vllm_0_32


def app_with(**arguments: Any) -> FastAPI:
    app = FastAPI()
    app.state.args = Namespace(
        **(
            {
                "additional_config": {},
                "served_model_name": None,
                "model": MODEL,
                "lora_modules": None,
                "trust_request_chat_template": False,
            }
            | arguments
        )
    )
    return app


def test_without_a_breaker_the_plugin_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIRCUIT_BREAKERS_BREAKER", raising=False)
    app = app_with()
    routes = list(app.routes)
    EndpointPlugin().attach_router(app)
    assert app.routes == routes
    assert app.user_middleware == []
    assert not hasattr(app.state, "service")


@pytest.mark.parametrize("option", ["lora_modules", "trust_request_chat_template"])
def test_server_option_that_opens_a_way_around_is_refused(option: str) -> None:
    app = app_with(**{"additional_config": {"circuit_breakers": {"breaker": "/a"}}, option: ["x"]})
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
        EndpointPlugin().attach_router(app)


def test_a_log_format_that_comes_too_late_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_LOG_FORMAT", "json")
    monkeypatch.setattr(endpoint_plugin, "REGISTRY", CollectorRegistry())
    app = app_with(additional_config={"circuit_breakers": {"breaker": "/a"}})
    with pytest.raises(ConfigError, match=r"set VLLM_LOGGING_CONFIG_PATH to .*engine_logging\.js"):
        EndpointPlugin().attach_router(app)


def test_a_key_that_nobody_would_print_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_CONSOLE", "1")
    monkeypatch.setattr(endpoint_plugin, "REGISTRY", CollectorRegistry())
    app = app_with(additional_config={"circuit_breakers": {"breaker": "/a"}})
    with pytest.raises(ConfigError, match="give an admin key in the policy file"):
        EndpointPlugin().attach_router(app)


def test_keys_and_policies_stand_in_front_of_vllms_routes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = policy_file(tmp_path)
    monkeypatch.setenv("CIRCUIT_BREAKERS_POLICIES", str(file))
    monkeypatch.setenv("CIRCUIT_BREAKERS_PEPPER_FILE", str(file.with_name("pepper")))
    monkeypatch.setattr(endpoint_plugin, "REGISTRY", CollectorRegistry())
    app = app_with(additional_config={"circuit_breakers": {"breaker": "/a"}})

    @app.get("/health")
    @app.post("/v1/responses")
    async def routes_of_vllm() -> str | None:
        policy = GuardSession().policy
        return policy.name if policy else None

    EndpointPlugin().attach_router(app)
    attach(app)
    client = TestClient(app)
    assert client.get("/health").status_code == 200
    for method, path in (("POST", "/v1/responses"), ("GET", "/v1/breaker"), ("GET", "/livez")):
        assert client.request(method, path).status_code == 401
    keys: dict[str, dict[str, str]] = {k: {"x-api-key": k} for k in ("team", "bound", "ops")}
    assert client.post("/v1/responses", headers=keys["team"]).json() == "strict"
    tightened = keys["bound"] | {"X-Breaker-Policy": "strict"}
    assert client.post("/v1/responses", headers=tightened).json() == "strict"
    loosened = keys["team"] | {"X-Breaker-Policy": "lax"}
    assert client.post("/v1/responses", headers=loosened).status_code == 400
    assert client.post("/v1/responses", headers=keys["ops"]).status_code == 403
    assert client.post("/v1/breaker/reload", headers=keys["ops"]).status_code == 200
    assert client.post("/pause", headers=keys["team"]).status_code == 404
    listed = {k: client.get("/v1/models", headers=headers).json() for k, headers in keys.items()}
    assert [model["id"] for model in listed["team"]["data"]] == ["m"]
    assert listed["bound"]["data"] == [], "its key is for another model"
    for key, status in (("team", 200), ("bound", 404)):
        assert client.get("/v1/models/m", headers=keys[key]).status_code == status
