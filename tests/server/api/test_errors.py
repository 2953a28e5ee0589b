"""Errors in the shape of the format that was asked for."""

from __future__ import annotations

import json

import pytest

from circuit_breakers.api.errors import ApiError, prompt_tripped

from .guard_reports import TRIPPED


def body(error: ApiError, *, anthropic: bool) -> tuple[int, dict[str, object]]:
    response = error.to_response(anthropic=anthropic)
    return response.status_code, json.loads(bytes(response.body))


def test_openais_shape_has_code_and_param() -> None:
    error = ApiError(400, "no", code="invalid_value", param="n")
    assert body(error, anthropic=False) == (
        400,
        {
            "error": {
                "message": "no",
                "type": "invalid_request_error",
                "param": "n",
                "code": "invalid_value",
            }
        },
    )


@pytest.mark.parametrize(
    ("status", "kind"),
    # The types that Anthropic's API documents, and what is nearest for other statuses.
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (415, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropics_shape_has_its_own_types(status: int, kind: str) -> None:
    seen, said = body(ApiError(status, "no"), anthropic=True)
    assert seen == status
    assert said["type"] == "error"
    assert isinstance(said["error"], dict)
    assert (said["error"]["type"], said["error"]["message"]) == (kind, "no")


def test_a_tripped_prompt_carries_its_guard_in_either_shape() -> None:
    for anthropic in (False, True):
        _, said = body(prompt_tripped(TRIPPED, param="messages"), anthropic=anthropic)
        assert isinstance(said["error"], dict)
        assert said["error"]["code"] == "content_filter"
        assert said["error"]["guard"] == TRIPPED.to_json()
