"""The real parsers of what the documentation shows: each takes a text, or says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.field_lists import MODERATION_FIELDS
from circuit_breakers.api.fields import FieldRules
from circuit_breakers.models import resolve_model
from circuit_breakers.policies.policy_file import load_policy_file
from circuit_breakers.policies.tightening import parse_guard_request
from circuit_breakers_training.data.jsonl import read_conversations
from circuit_breakers_training.recipes.resolution import resolve_recipe

__all__ = ["PARSERS"]

_RULES: dict[str, FieldRules] = {name: spec.rules for name, spec in ENDPOINTS.items()} | {
    "moderation": MODERATION_FIELDS
}
_HASH = f"hmac-sha256:{'0' * 8}:{'0' * 64}"
"""In place of one that a page shortens."""


def _recipe(text: str, directory: Path) -> None:
    file = directory / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    # "auto" asks a model; any will do.
    built_in = resolve_model("smollm2-135m-instruct").path
    resolve_recipe(file, find_model=lambda name: built_in)


def _policies(text: str, directory: Path) -> None:
    file = directory / "policies-shown.toml"
    file.write_text(text.replace('"hmac-sha256:..."', f'"{_HASH}"'), encoding="utf-8")
    load_policy_file(file)


def _conversations(text: str, directory: Path) -> None:
    file = directory / "conversations.jsonl"
    file.write_text(text, encoding="utf-8")
    assert read_conversations(file)


def _request(rules: FieldRules) -> Callable[[str, Path], None]:
    def parse(text: str, directory: Path) -> None:
        body = json.loads(text)
        if "guard" in body:
            parse_guard_request(body.pop("guard"))
        missing = {rules.prompt_field, *rules.required} - body.keys()
        assert not missing, f"got a request without {missing}"
        rules.select(body, max_choices=16)

    return parse


def _json(text: str, directory: Path) -> None:
    json.loads(text)


def _yaml(text: str, directory: Path) -> None:
    assert yaml.safe_load(text)


PARSERS: dict[str, Callable[[str, Path], None]] = {
    "recipe": _recipe,
    "policies": _policies,
    "conversations": _conversations,
    "json": _json,
    "yaml": _yaml,
    **{name: _request(rules) for name, rules in _RULES.items()},
}
"""By the kind that a mark names; each gets the text and a folder that it may write to."""
