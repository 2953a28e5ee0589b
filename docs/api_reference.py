"""The tables of api.md, made of the OpenAPI document that the server gives and of its field lists.

app ─ OpenAPI document ─ a section for each operation
field lists ─ what is refused, and why
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from circuit_breakers.api.app import create_app
from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.field_lists import MODERATION_FIELDS
from circuit_breakers.api.fields import FieldRules
from circuit_breakers.settings import ServeSettings

__all__ = ["api_tables", "openapi_document"]

RULES: dict[str, FieldRules] = {
    "/v1/chat/completions": ENDPOINTS["chat"].rules,
    "/v1/completions": ENDPOINTS["completion"].rules,
    "/v1/responses": ENDPOINTS["response"].rules,
    "/v1/messages": ENDPOINTS["message"].rules,
    "/v1/moderations": MODERATION_FIELDS,
}
"""Of each route that generates or scores."""


def openapi_document() -> dict[str, Any]:
    """What GET /openapi.json answers before an engine is there."""
    document: dict[str, Any] = create_app(ServeSettings(), CollectorRegistry()).openapi()
    return document


def api_tables() -> str:
    """Markdown: a section for each operation, then what they share."""
    document = openapi_document()
    parts = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    shared = (_tightening(document), _statuses(document), _refused())
    return "\n\n".join(["## Routes", *parts, *shared]) + "\n"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path}", operation["summary"]]
    if parameters := operation.get("parameters"):
        rows = [(f"`{p['name']}`", p["in"], _type(p["schema"])) for p in parameters]
        lines.append(_table(("parameter", "in", "type"), rows))
    if body := operation.get("requestBody"):
        schema = body["content"]["application/json"]["schema"]
        lines += list(_fields(schema, RULES[path]))
    answers = operation["responses"]
    kinds = ", ".join(f"`{kind}`" for kind in answers["200"].get("content", {}))
    errors = ", ".join(status for status in answers if status != "200")
    lines.append(f"Answer: 200 as {kinds}." + (f" Errors: {errors}." if errors else ""))
    return "\n\n".join(lines)


def _fields(schema: dict[str, Any], rules: FieldRules) -> Iterator[str]:
    """The request fields of one route, by what they do."""
    required = schema["required"]
    taken = [name for name in schema["properties"] if name not in rules.ignored]
    yield f"Required: {_code(required)}."
    yield f"Also taken: {_code(name for name in taken if name not in required)}."
    if rules.ignored:
        yield f"Taken, and without an effect here: {_code(sorted(rules.ignored))}."


def _tightening(document: dict[str, Any]) -> str:
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    guard = body["content"]["application/json"]["schema"]["properties"]["guard"]
    rows = [(f"`{name}`", _type(schema)) for name, schema in guard["properties"].items()]
    return "## The field `guard` of a request\n\n" + _table(("field", "type"), rows)


def _statuses(document: dict[str, Any]) -> str:
    described: dict[str, str] = {}
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status != "200" and len(answer["description"]) > len(described.get(status, "")):
                    described[status] = answer["description"]
    return "## Errors\n\n" + _table(("status", "means"), sorted(described.items()))


def _refused() -> str:
    """Every refused field, once for each reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for path, rules in RULES.items():
        for name, (why, _) in rules.refused.items():
            where.setdefault((name, why), []).append(path.removeprefix("/v1/"))
    rows = [(f"`{name}`", ", ".join(paths), why) for (name, why), paths in sorted(where.items())]
    return (
        "## Refused fields\n\nA refused field with its neutral value (`null`, `false`) is let "
        "through, since it says nothing. A field that is in none of the lists is unknown, a 400."
        "\n\n" + _table(("field", "of", "why it is not served"), rows)
    )


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    if schema.get("type") == "object":
        return f"object of {_type(schema['additionalProperties'])}"
    bounds = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
        "maxLength": "characters, at most",
    }
    words = [f"{word} {schema[name]:g}" for name, word in bounds.items() if name in schema]
    default = f"; {schema['default']} unless given" if schema.get("default") is not None else ""
    return ", ".join([str(schema.get("format") or schema.get("type", "any")), *words]) + default


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
