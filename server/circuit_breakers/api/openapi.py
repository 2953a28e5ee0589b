"""The OpenAPI document: what each route takes and answers, errors included.

Request fields come from the closed lists, answers from vLLM's own models, so that the document
cannot say another thing than the server does. vLLM's models are there once the engine is; until
then an answer is any object.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response

from circuit_breakers.api.endpoints import ENDPOINTS, Endpoint
from circuit_breakers.api.field_lists import MODERATION_FIELDS
from circuit_breakers.api.fields import FieldRules

__all__ = ["describe", "generating", "probing", "reading", "showing", "with_answers"]

_SERVING_MODULE = "circuit_breakers.api.serving"
_REF = "#/components/schemas/{model}"

_ERRORS = {
    400: "The request does not fit, or the circuit breaker stopped its prompt.",
    401: "No API key, or an unknown one.",
    403: "The API key does not allow this.",
    404: "There is no such model.",
    408: "The body did not come in within its time.",
    413: "The body is too large.",
    415: "The body is not JSON by its content type.",
    429: "Too many requests of this API key; see Retry-After.",
    500: "The server is at fault; nothing of the answer was sent.",
    503: "The server is not ready, or full; see Retry-After.",
    504: "The answer was not complete within the time for a request.",
}
_OF_READING = (400, 401, 403, 404, 503)

_NULLABLE_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_NULLABLE_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
_GUARD = {
    "description": "What the circuit breaker saw: the trip, or the score that came closest.",
    "anyOf": [
        {
            "type": "object",
            "required": ["breaker", "policy", "mode", "tripped"],
            "properties": {
                "breaker": {"type": "string"},
                "policy": {"type": "string"},
                "mode": {"enum": ["observe", "enforce"]},
                "tripped": {"type": "boolean"},
                "phase": {"enum": ["prompt", "completion", None]},
                "probe": _NULLABLE_TEXT,
                "score": _NULLABLE_NUMBER,
                "threshold": _NULLABLE_NUMBER,
                "token_index": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
        },
        {"type": "null"},
    ],
}
_TOKEN_SCORES = {
    "description": "For an admin who asks by guard.token_scores: each judged token, in order.",
    "type": "array",
    "items": {
        "type": "object",
        "required": ["index", "phase", "token", "score", "probe", "threshold"],
        "properties": {
            "index": {"type": "integer", "description": "Position in prompt and completion."},
            "phase": {"enum": ["prompt", "completion"]},
            "token": _NULLABLE_TEXT | {"description": "Its text; null where it is withheld."},
            "score": _NULLABLE_NUMBER | {"description": "Null where no score is judged."},
            "probe": _NULLABLE_TEXT,
            "threshold": _NULLABLE_NUMBER,
        },
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
                "guard": _GUARD,
                "token_scores": _TOKEN_SCORES,
            },
        }
    },
}
_MODERATION = {
    "type": "object",
    "required": ["id", "model", "results"],
    "properties": {
        "id": {"type": "string"},
        "model": {"type": "string"},
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    *("flagged", "categories", "category_scores", "category_applied_input_types")
                ],
                "properties": {
                    "flagged": {"type": "boolean"},
                    "categories": {
                        "type": "object",
                        "additionalProperties": {"type": "boolean"},
                    },
                    "category_scores": {
                        "type": "object",
                        "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                    "category_applied_input_types": {
                        "type": "object",
                        "additionalProperties": {"type": "array", "items": {"const": "text"}},
                    },
                },
            },
        },
    },
}
_ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("ChatAnswer", {"type": "object"}),
    "/v1/completions": ("CompletionAnswer", {"type": "object"}),
    "/v1/responses": ("ResponseAnswer", {"type": "object"}),
    "/v1/messages": ("MessageAnswer", {"type": "object"}),
    "/v1/moderations": ("ModerationAnswer", _MODERATION),
}
_ENDPOINT_OF_ANSWER: dict[str, Endpoint] = {
    "ChatAnswer": "chat",
    "CompletionAnswer": "completion",
    "ResponseAnswer": "response",
    "MessageAnswer": "message",
}


def generating(
    endpoint: Endpoint | None, path: str, operation: str, summary: str
) -> dict[str, Any]:
    """Arguments of FastAPI's decorator for a route that generates; None: the one that scores."""
    rules: FieldRules = MODERATION_FIELDS if endpoint is None else ENDPOINTS[endpoint].rules
    name, _ = _ANSWERS[path]
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}
    if "stream" in rules.names:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "path": path,
        "operation_id": operation,
        "summary": summary,
        "response_model": None,
        "responses": {200: {"description": "The answer.", "content": content}} | _errors(_ERRORS),
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": rules.json_schema()}},
            }
        },
    }


def reading(path: str, operation: str, summary: str, *parameters: str) -> dict[str, Any]:
    """Arguments of FastAPI's decorator for a route that tells something of the server.

    Args:
        parameters: names in the path, each a text.
    """
    described = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in parameters
    ]
    return {
        "path": path,
        "operation_id": operation,
        "summary": summary,
        "responses": _errors(_OF_READING),
        "openapi_extra": {"parameters": described} if described else None,
    }


def probing(path: str, operation: str, summary: str) -> dict[str, Any]:
    """Arguments of FastAPI's decorator for a route that orchestrators ask; no key, no error."""
    shared = {"path": path, "operation_id": operation, "summary": summary}
    if path == "/metrics":
        return shared | {"response_class": PlainTextResponse}
    return shared | {"responses": {503: {"description": "No."}}}


def showing(path: str, operation: str, summary: str, media_type: str) -> dict[str, Any]:
    """Arguments of FastAPI's decorator for a file of the console; no key, no error."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {
        "path": path,
        "operation_id": operation,
        "summary": summary,
        "response_class": Response,
        "responses": {
            200: {"description": "The file.", "content": content},
            304: {"description": "The client has it."},
        },
    }


def describe(app: FastAPI) -> None:
    """Makes the document of `app` complete: answers and errors that its routes refer to."""
    paths_only = app.openapi

    def document() -> dict[str, Any]:
        # Not imported: that would take vLLM along, into a process that has no engine yet.
        module = sys.modules.get(_SERVING_MODULE)
        is_live = app.state.service.attached is not None
        return with_answers(paths_only(), module.answer_schemas if module and is_live else None)

    app.openapi = document  # type: ignore[method-assign]


def with_answers(document: dict[str, Any], answer_schemas: Any | None) -> dict[str, Any]:
    """A document with the schemas of all answers; vLLM's where there is an engine.

    Args:
        answer_schemas: that of api/serving.py; None before an engine is there.
    """
    schemas = {name: dict(schema) for name, schema in _ANSWERS.values()} | {"Error": _ERROR}
    if answer_schemas is not None:
        answers, definitions = answer_schemas(_REF)
        schemas |= definitions
        for name, endpoint in _ENDPOINT_OF_ANSWER.items():
            added: dict[str, Any] = {"guard": _GUARD}
            if ENDPOINTS[endpoint].rules.has_token_scores:
                choice = {"guard": _GUARD, "token_scores": _TOKEN_SCORES}
                added["choices"] = {
                    "type": "array",
                    "items": {"type": "object", "properties": choice},
                }
            described = {"type": "object", "properties": added}
            schemas[name] = {"allOf": [answers[endpoint], described]}
    components = document.get("components", {})
    schemas = components.get("schemas", {}) | schemas
    return document | {"components": components | {"schemas": schemas}}


def _errors(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": _REF.format(model="Error")}
    return {
        status: {
            "description": _ERRORS[status],
            "content": {"application/json": {"schema": schema}},
        }
        for status in statuses
    }
