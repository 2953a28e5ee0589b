"""Requests that schemathesis makes out of the OpenAPI document: no server error, answers as told.

The document lists the fields of a body without their types, so a body made of it alone is refused
at its first field. Here up to two of its fields are put into a body that would be served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .conftest import Server
from .test_openapi import BODIES, operations

CASES_WITH_BODY, CASES_WITHOUT = 20, 4
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
LENGTHENING = ("max_tokens", "max_output_tokens", "max_completion_tokens", "n")
"""Their tests are elsewhere; here they would only make answers longer."""


def test_no_request_out_of_the_document_is_a_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    num_asked: Counter[tuple[str, str]] = Counter()
    statuses: Counter[int] = Counter()

    def ask(case: Any) -> None:
        response = case.call(timeout=60)
        num_asked[case.method.lower(), case.operation.path] += 1
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    for result in schema.get_all_operations():
        operation = result.ok()
        base = BODIES.get(operation.path)
        cases = operation.as_strategy() if base is None else bodies(operation, base)
        run(ask, cases, CASES_WITHOUT if base is None else CASES_WITH_BODY)
    document = server.http.get("/openapi.json").json()
    assert num_asked.keys() == {(method, path) for method, path, _ in operations(document)}
    for (_, path), number in num_asked.items():
        assert number >= (CASES_WITH_BODY if path in BODIES else 1)
    # Both kinds were seen, many times each.
    assert min(statuses[200], statuses[400]) >= CASES_WITH_BODY, statuses


@st.composite
def bodies(draw: st.DrawFn, operation: Any, base: dict[str, Any]) -> Any:
    """Cases with up to two of the fields that schemathesis made, beside those of `base`."""
    case = draw(operation.as_strategy())
    names = sorted(case.body.keys() - set(LENGTHENING))
    chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
    case.body = base | {name: case.body[name] for name in chosen}
    return case


def run(ask: Callable[[Any], None], cases: st.SearchStrategy[Any], num_cases: int) -> None:
    """The same cases in every run."""
    bounded = settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(20)(bounded(given(cases)(ask)))()
