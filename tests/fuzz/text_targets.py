"""Fuzz targets of what people and clients write: policies, keys, requests, recipes, bars, logs."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from circuit_breakers.api.access import take_guard_request
from circuit_breakers.api.body import parse_json_object
from circuit_breakers.api.endpoints import ENDPOINTS
from circuit_breakers.api.errors import ApiError
from circuit_breakers.api.moderation import moderation_request
from circuit_breakers.audit.chain import HASHED_FIELDS, Head, Signer
from circuit_breakers.audit.verification import verify_rows
from circuit_breakers.cli.auditing import _exported_rows
from circuit_breakers.errors import ConfigError, ModelError, PolicyRequestError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.key_table import key_table
from circuit_breakers.policies.policy_book import PolicyBook
from circuit_breakers.policies.policy_file import LoadedFile, PolicyFile, load_policy_file
from circuit_breakers.policies.served_policy import ServedPolicy
from circuit_breakers.policies.tightening import GuardRequest, loosenings
from circuit_breakers_training.gate.rows import load_bars
from circuit_breakers_training.recipes.config import Recipe
from circuit_breakers_training.recipes.resolution import resolve_recipe

from ..server.policies.manifests import manifest
from .artifact_targets import scratch

__all__ = ["AUDIT_KEY", "audit", "bars", "body", "key", "policies", "recipe"]

AUDIT_KEY = b"k" * 32
"""Signs the seed log."""
_LOG = Path(__file__).parent / "seeds" / "audit" / "log"


def policies(data: bytes) -> bool:
    """A policy file, put in force for a breaker with probes p0 and p1."""
    file = _file("policies.toml", data)
    own = ServedPolicy(policy=Policy.from_manifest(manifest(), "enforce"))
    try:
        loaded = load_policy_file(file)
        _check_policy_file(loaded)
        book = PolicyBook.from_file(loaded, own, manifest())
    except ConfigError as e:
        assert "policies.toml" in str(e)
        return False
    for key in loaded.content.keys:
        assert book.of_key(key) in book.policies.values()
        assert key.has_expired() in (True, False)
    for served, other in product(list(book.policies.values())[:4], list(book.policies)[:4]):
        try:
            tightened = book.tightened(served, GuardRequest(policy=other))
        except PolicyRequestError:
            continue
        assert loosenings(served, tightened) == []
    return True


def _check_policy_file(loaded: LoadedFile) -> None:
    content = loaded.content
    assert PolicyFile.model_validate_json(content.model_dump_json()) == content
    assert content.default in content.policies


def key(data: bytes) -> bool:
    """Id, hash, policy and scopes of an API key, a line each."""
    fields = (data.decode("utf-8", "replace").split("\n") + [""] * 4)[:4]
    key_id, key_hash, policy, scope = fields
    try:
        table = key_table(key_id, key_hash, policy=policy or None, scope=scope.split())
    except ConfigError:
        return False
    name = json.dumps(policy or "standard")
    file = _file("keys.toml", f"default = {name}\n[policies.{name}]\n{table}\n".encode())
    (read,) = load_policy_file(file).content.keys
    assert (read.id, read.hash, read.policy or "") == (key_id, key_hash, policy)
    assert read.scope == (set(scope.split()) or {"inference"})
    return True


def body(data: bytes) -> bool:
    """A request of the endpoint that the first byte says, up to where vLLM's models take over."""
    endpoint = sorted(ENDPOINTS)[data[0] % len(ENDPOINTS)] if data else "chat"
    try:
        request = parse_json_object(data[1:])
        assert parse_json_object(json.dumps(request, allow_nan=False).encode()) == request
        asked = take_guard_request(request)
        if asked is not None:
            _check_tightened(asked)
        moderation_request(request.get("moderation"), ("b",))
        selected = ENDPOINTS[endpoint].rules.select(request, max_choices=16)
    except ApiError as e:
        assert e.status in (400, 404)
        _sendable(e.to_json())
        return False
    assert selected.keys() <= request.keys()
    _sendable(selected)
    return True


def _check_tightened(asked: GuardRequest) -> None:
    own = ServedPolicy(policy=Policy.from_manifest(manifest(), "enforce"))
    book = PolicyBook.without_file(own, manifest())
    try:
        assert loosenings(own, book.tightened(own, asked)) == []
    except PolicyRequestError as e:
        raise ApiError(400, str(e)) from e


def _sendable(value: Any) -> None:
    """An answer may repeat it."""
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def recipe(data: bytes) -> bool:
    """A recipe file, resolved without a model to ask."""
    try:
        resolved = resolve_recipe(_file("recipe.toml", data), find_model=_no_model)
    except (ConfigError, ModelError):
        return False
    read = resolved.recipe
    assert Recipe.model_validate_json(read.model_dump_json()) == read
    assert resolved.describe() and read.training_digest()
    # As a manifest takes it in.
    json.dumps(read.model_dump(mode="json"), allow_nan=False)
    return True


def _no_model(name: str) -> Path:
    raise ModelError(f"no model {name!r} here")


def bars(data: bytes) -> bool:
    """The gate's bars."""
    try:
        loaded = load_bars(_file("bars.toml", data))
    except ConfigError:
        return False
    for bar in loaded.by_name.values():
        assert bar.min_count >= 1
        assert all(math.isfinite(x) for x in (bar.at_least, bar.at_most) if x is not None)
        assert not bar.holds(math.nan, 10**6)
    return True


def audit(data: bytes) -> bool:
    """A head that is expected, or an empty line, and an export of the log, signed.

    Accepted is only what the one who holds the key has written, row by row.
    """
    head, _, rows = data.partition(b"\n")
    file = _file("audit.jsonl", rows)
    try:
        expected = Head.parse(head.decode("utf-8", "replace")) if head else None
        found = verify_rows(_exported_rows(file), Signer([AUDIT_KEY]), expected)
    except ConfigError:
        return False
    assert [str(finding) for finding in found.findings if str(finding)] != [] or found.head
    if found.findings:
        return False
    written = {row["hash"]: row for row in map(json.loads, _LOG.read_text().splitlines()[1:])}
    for row in _exported_rows(file):
        original = written[row["hash"]]
        assert {name: row[name] for name in HASHED_FIELDS} == {
            name: original[name] for name in HASHED_FIELDS
        }
    return True


def _file(name: str, data: bytes) -> Path:
    file = scratch() / name
    file.write_bytes(data)
    return file
