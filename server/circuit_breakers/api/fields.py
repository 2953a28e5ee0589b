"""Which request fields are let through to vLLM's serving classes, and why the others are not.

vLLM's request models accept any field and many of their own would get around the guard. So both
lists are closed: a field is allowed, ignored, refused with a reason, or unknown. A refused field
with its neutral value says nothing and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.prompts import num_prompts
from circuit_breakers.policies.tightening import GuardRequest

__all__ = ["FieldRules"]

_MAX_CHARS = {
    "output_config": 1 << 16,
    "response_format": 1 << 16,
    "stop": 1 << 12,
    "stop_sequences": 1 << 12,
    "structured_outputs": 1 << 16,
    "text": 1 << 16,
    "tools": 1 << 17,
}
"""Longest value of a field, as JSON: far above what people send."""
_MAX_GRAMMAR_CHOICES = 512


@dataclass(frozen=True, kw_only=True)
class FieldRules:
    """The closed lists of one endpoint."""

    prompt_field: str
    """The field that holds the prompt."""
    allowed: frozenset[str]
    ignored: frozenset[str]
    """Fields of OpenAI's API that change nothing here."""
    refused: Mapping[str, tuple[str, tuple[Any, ...]]]
    """Field -> (why, values that are the same as leaving it out)."""
    own: frozenset[str] = frozenset()
    """Fields that this server reads itself; they do not go on to vLLM."""
    required: tuple[str, ...] = ()
    """Fields besides the prompt that a request must have."""
    has_token_scores: bool = False
    """Its answers have a place for the scores of single tokens."""
    check: Callable[[Mapping[str, Any]], None]
    """Passes for a prompt that is text; raises ApiError for any other."""

    @property
    def names(self) -> frozenset[str]:
        """Every field that a request may have."""
        return self.allowed | self.ignored | self.own

    def select(self, data: dict[str, Any], *, max_choices: int) -> dict[str, Any]:
        """The fields of `data` that go on to vLLM.

        Raises:
            ApiError: 400 for an unknown or refused field, an empty prompt, or too many choices.
        """
        if unknown := sorted(data.keys() - self.names - self.refused.keys()):
            raise ApiError(
                400,
                f"unknown fields: {', '.join(map(repr, unknown))}; remove them, or see "
                "/openapi.json for the fields that are served",
                code="unknown_parameter",
                param=unknown[0],
            )
        for name in sorted(data.keys() & self.refused.keys()):
            why, neutral = self.refused[name]
            # Compared by type too: 1 == True, and a list of strings is never neutral.
            if not any(type(data[name]) is type(v) and data[name] == v for v in neutral):
                raise ApiError(
                    400,
                    f"{name!r} is not served: {why}; remove it",
                    code="unsupported_parameter",
                    param=name,
                )
        selected = {name: value for name, value in data.items() if name in self.allowed}
        _check_sizes(selected)
        self.check(selected)
        _check_choices(selected, max_choices)
        return selected

    def json_schema(self) -> dict[str, Any]:
        """The top level of the request body, for OpenAPI."""
        # `guard` is read before the fields are selected (api/access.py).
        guard = GuardRequest.model_json_schema()
        if not self.has_token_scores:
            del guard["properties"]["token_scores"]
        return {
            "type": "object",
            "required": [self.prompt_field, *self.required],
            "properties": {
                "guard": guard,
                **{name: {} for name in sorted(self.names)},
            },
            "additionalProperties": False,
        }


def _check_sizes(selected: Mapping[str, Any]) -> None:
    """Keeps out what a grammar compiler or a stop-string search would chew on for seconds."""
    for name, max_chars in _MAX_CHARS.items():
        if (size := len(json.dumps(selected.get(name)))) > max_chars:
            raise ApiError(
                400,
                f"{name!r} has {size} characters, expected at most {max_chars}; send a smaller one",
                code="invalid_value",
                param=name,
            )
    grammar = selected.get("structured_outputs")
    choices = grammar.get("choice") if isinstance(grammar, dict) else None
    if isinstance(choices, list) and len(choices) > _MAX_GRAMMAR_CHOICES:
        raise ApiError(
            400,
            f"got {len(choices)} choices, expected at most {_MAX_GRAMMAR_CHOICES}; send fewer",
            code="invalid_value",
            param="structured_outputs",
        )


def _check_choices(selected: dict[str, Any], max_choices: int) -> None:
    n = selected.get("n")
    if n is None:
        n = 1
        selected.pop("n", None)
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ApiError(
            400, f"got n = {n!r}, expected an integer from 1", code="invalid_value", param="n"
        )
    if (asked := n * num_prompts(selected.get("prompt"))) > max_choices:
        raise ApiError(
            400,
            f"got {asked} completions in one request, expected at most {max_choices}; send "
            "several requests, or raise --max-choices on the server",
            code="invalid_value",
            param="n",
        )
