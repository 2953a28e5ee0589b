"""A path is served as it is spelt, or not at all."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
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


def test_an_escape_in_the_query_is_nobodys_business() -> None:
    client = TestClient(create_app(ServeSettings(), CollectorRegistry()))
    assert client.get("/livez?a=%2f").status_code == 200
