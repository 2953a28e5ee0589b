"""The OpenAPI document says what the server does: its routes, their fields, their answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.settings import ServeSettings

from .conftest import MODEL, Server, user

UNDOCUMENTED = {("get", "/openapi.json"), ("head", "/openapi.json")}
"""The document does not describe itself."""
FOR_OPERATORS = {"/v1/breaker/reload", "/v1/breaker/trips", "/v1/breaker/what-if"}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": user("hi"), "max_tokens": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"model": MODEL, "messages": user("hi"), "max_tokens": 2},
    "/v1/moderations": {"input": "hi"},
}


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from references(part)
    elif isinstance(value, list):
        for part in value:
            yield from references(part)


@pytest.fixture(scope="module")
def document() -> Any:
    app = create_app(ServeSettings(), CollectorRegistry())
    return TestClient(app).get("/openapi.json").json()


def test_each_served_route_is_documented(document: Any) -> None:
    app = create_app(ServeSettings(), CollectorRegistry())
    served = {
        (method.lower(), re.sub(r":\w+}", "}", str(getattr(route, "path", ""))))
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
    }
    documented = {(method, path) for method, path, _ in operations(document)}
    assert served - UNDOCUMENTED == documented


def test_each_operation_has_a_name_of_its_own_and_says_what_it_is_for(document: Any) -> None:
    listed = list(operations(document))
    names = [operation["operationId"] for *_, operation in listed]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for *_, operation in listed)


def test_each_generating_route_lists_its_errors_and_its_fields(document: Any) -> None:
    for path in BODIES:
        operation = document["paths"][path]["post"]
        assert {int(status) for status in operation["responses"]} == {
            *(200, 400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
        }
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False
        assert set(schema["required"]) <= set(schema["properties"])
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert set(chat["application/json"]["schema"]["properties"]) == {
        *ENDPOINTS["chat"].rules.names,
        "guard",  # read by api/access.py
    }


@pytest.mark.parametrize("live", [False, True])
def test_every_reference_leads_somewhere(document: Any, server: Server, live: bool) -> None:
    seen = server.http.get("/openapi.json").json() if live else document
    schemas = seen["components"]["schemas"]
    missing = {ref for ref in references(seen) if ref.rsplit("/", 1)[1] not in schemas}
    assert not missing
    assert ("ChatCompletionResponse" in schemas) == live


def test_each_documented_route_answers(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for method, path, operation in operations(document):
        url = path.replace("{model}", MODEL)
        response = server.http.request(method, url, json=BODIES.get(path))
        if path in FOR_OPERATORS:
            assert response.status_code == 403
            continue
        assert response.status_code == 200, (method, path, response.text)
        if path in BODIES:
            # Its required fields are the ones without which it does not answer.
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert set(schema["required"]) <= BODIES[path].keys()
            refused = server.http.request(method, url, json={"nope": 1})
            assert refused.status_code == 400
