"""Errors of the HTTP API, in OpenAI's shape.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`type` is invalid_request_error below 500 (requests for a 429, as OpenAI names the limit that was
met) and server_error from there on; Anthropic's format has its own words for it. A prompt that
trips is answered like one of OpenAI's own content filters: 400 with code content_filter, plus the
guard report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from circuit_breakers.errors import CircuitBreakersError
from circuit_breakers.guard.decision import GuardReport

__all__ = [
    "ApiError",
    "engine_dead",
    "from_validation_error",
    "from_vllm_error",
    "not_ready",
    "prompt_tripped",
    "stopped",
    "unreadable_answer",
]

_CODE_BY_STATUS = {
    404: "model_not_found",
    501: "not_implemented",
    503: "unavailable",
}
_TYPE_BY_STATUS = {429: "requests"}

_MAX_SHOWN = 3
"""Fields named in one message, and problems named for one field."""
_TYPE_NAMES = frozenset({"bool", "dict", "float", "int", "list", "none", "str"})
"""Parts of a pydantic location that name a branch of a union, not a field."""

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(CircuitBreakersError):
    """Ends a request with a status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        guard: GuardReport | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.guard = guard
        self.token_scores: list[dict[str, Any]] | None = None
        """Beside `guard`, for an admin who asked."""
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error: dict[str, Any] = {
            "message": str(self),
            "type": _TYPE_BY_STATUS.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        if self.guard is not None:
            error["guard"] = self.guard.to_json()
        if self.token_scores is not None:
            error["token_scores"] = self.token_scores
        return {"error": error}

    def to_anthropic_json(self) -> dict[str, Any]:
        """The body of the response in Anthropic's shape, with OpenAI's code beside it."""
        error = self.to_json()["error"]
        error["type"] = _ANTHROPIC_TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "api_error"
        )
        return {"type": "error", "error": error}

    def to_response(self, *, anthropic: bool = False) -> JSONResponse:
        body = self.to_anthropic_json() if anthropic else self.to_json()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def prompt_tripped(report: GuardReport, *, param: str) -> ApiError:
    """The answer to a prompt that tripped; nothing was generated from it."""
    return ApiError(
        400,
        "The prompt was stopped by the circuit breaker; nothing was generated. "
        "Change the prompt and send it again.",
        code="content_filter",
        param=param,
        guard=report,
    )


def stopped(report: GuardReport) -> ApiError:
    """The answer to a trip where the text before it cannot or may not be shown."""
    return ApiError(
        400,
        f"The {report.phase} was stopped by the circuit breaker. Change the prompt and send it "
        "again.",
        code="content_filter",
        guard=report,
    )


def unreadable_answer() -> ApiError:
    """The answer where the model's tool calls do not fit the format; not the client's fault."""
    return ApiError(
        500,
        "the model wrote a tool call whose arguments are not an object; send the request again, or "
        "set 'strict' on the tool",
        code="invalid_tool_call",
    )


def not_ready(reason: str) -> ApiError:
    """The answer to anything that needs an engine while there is none."""
    return ApiError(
        503,
        f"the server is not ready: {reason}; try again when /readyz answers 200",
        code="not_ready",
        headers={"Retry-After": "5"},
    )


def engine_dead() -> ApiError:
    """The answer to what an engine's death broke off; the server ends with it."""
    return ApiError(
        503,
        "the engine died and the server ends with it; try again when it has been started anew",
        code="engine_dead",
        headers={"Retry-After": "5"},
    )


def from_vllm_error(error: Mapping[str, Any]) -> ApiError:
    """An error of vLLM's serving classes: {"message", "code" (an HTTP status), "param"}."""
    status = int(error["code"])
    # "(parameter=..., value=...)" repeats what `param` and the text say.
    message = re.sub(r" \(parameter=.*\)$", "", str(error["message"]), flags=re.DOTALL)
    code = _CODE_BY_STATUS.get(status)
    if "maximum context length" in message:
        code = "context_length_exceeded"
    headers = {"Retry-After": "1"} if status == 503 else {}
    return ApiError(status, message, code=code, param=error.get("param"), headers=headers)


def from_validation_error(error: ValidationError) -> ApiError:
    """What does not fit vLLM's model of a request: the first few fields, each by its path."""
    by_field: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        messages = by_field.setdefault(_field_path(problem["loc"]), [])
        # One for each branch of a union.
        if len(messages) < _MAX_SHOWN and problem["msg"] not in messages:
            messages.append(problem["msg"])
    shown = list(by_field.items())[:_MAX_SHOWN]
    listed = "; ".join(f"{name}: {', or '.join(messages)}" for name, messages in shown)
    return ApiError(400, f"invalid fields: {listed}", code="invalid_value", param=shown[0][0])


def _field_path(location: tuple[int | str, ...]) -> str:
    parts = [
        str(part)
        for part in location
        if isinstance(part, int) or (re.fullmatch(r"[a-z_]+", part) and part not in _TYPE_NAMES)
    ]
    return ".".join(parts) or "body"
