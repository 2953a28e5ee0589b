"""A path is served as it is spelt, or not at all."""

from __future__ import annotations

import pytest
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.exact_path import ExactPath
from circuit_breakers.settings import ServeSettings


@pytest.mark.parametrize("path", ["/livez", "/%6civez", "/livez%00", "/%2flivez", "/livez%3bx"])
def test_a_path_with_an_escape_is_an_unknown_route(path: str) -> None:
    client = TestClient(create_app(ServeSettings(), CollectorRegistry()))
    response = client.get(path)
    if path == "/livez":
        assert response.status_code == 200
        return
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "unknown_route"
    assert path in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "is_known"),
    [
        ("GET", "/v1/models/owner%2Fname", True),
        ("GET", "/v1/models/owner%2fname", True),
        ("POST", "/v1/models/owner%2Fname", False),
        ("GET", "/v1/models/owner%252Fname", False),
        ("GET", "/v1/models/%2Fname", False),
        ("GET", "/v1/models/..%2Fbreaker", False),
        ("GET", "/v1/models%2Fname", False),
        ("GET", "/v1/models;x", False),
    ],
)
def test_only_a_models_name_may_have_an_escaped_slash(
    method: str, path: str, is_known: bool
) -> None:
    app = ExactPath(PlainTextResponse("inside"))
    response = TestClient(app).request(method, path)
    assert response.status_code == (200 if is_known else 404), response.text


def test_an_escape_in_the_query_is_nobodys_business() -> None:
    client = TestClient(create_app(ServeSettings(), CollectorRegistry()))
    assert client.get("/livez?a=%2f").status_code == 200
