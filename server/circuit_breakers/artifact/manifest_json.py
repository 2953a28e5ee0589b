"""Manifest to and from the bytes of manifest.json; errors name field, got and expected."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from circuit_breakers.artifact.manifest import SCHEMA_VERSION, Manifest
from circuit_breakers.artifact.strict_json import load_json
from circuit_breakers.errors import ArtifactError

__all__ = ["manifest_from_json", "manifest_to_json", "parse_manifest"]

_MAX_BYTES = 8 * 1024 * 1024
_MAX_SHOWN = 3


def manifest_to_json(manifest: Manifest) -> bytes:
    """The bytes of manifest.json; equal manifests give equal bytes.

    Raises:
        ArtifactError: the recipe holds a NaN or an infinity, which JSON cannot say.
    """
    try:
        text = json.dumps(
            manifest.model_dump(mode="json"),
            indent=2,
            sort_keys=True,
            ensure_ascii=False,
            allow_nan=False,
        )
    except ValueError as e:
        raise ArtifactError(
            f"manifest has a number that JSON cannot hold ({e}), expected finite numbers; "
            "leave it out of the recipe"
        ) from e
    return text.encode() + b"\n"


def manifest_from_json(data: bytes, where: str) -> Manifest:
    """The manifest in `data`.

    Args:
        where: path to name in messages.
    Raises:
        ArtifactError: not JSON, another schema version, or a field that does not fit.
    """
    if len(data) > _MAX_BYTES:
        raise ArtifactError(
            f"{where}: got {len(data)} bytes, expected at most {_MAX_BYTES}; "
            "export the breaker again"
        )
    try:
        raw = load_json(data)
    except ValueError as e:
        raise ArtifactError(
            f"{where}: got text that is not valid JSON ({e}), expected a breaker manifest; "
            "copy or export the breaker again"
        ) from e
    if not isinstance(raw, dict):
        raise ArtifactError(
            f"{where}: got a JSON {type(raw).__name__}, expected an object; "
            "export the breaker again"
        )
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        cure = "upgrade circuit-breakers" if newer else "export the breaker again"
        raise ArtifactError(
            f"{where}: got schema_version {version!r}, expected {SCHEMA_VERSION}; {cure}"
        )
    return parse_manifest(data, where)


def parse_manifest(data: bytes | dict[str, Any], where: str) -> Manifest:
    """The manifest in JSON bytes (strict types) or Python values; errors name each field."""
    try:
        if isinstance(data, bytes):
            return Manifest.model_validate_json(data, strict=True)
        return Manifest.model_validate(data)
    except ValidationError as e:
        problems = e.errors(include_url=False)
        shown = "; ".join(_explain(p) for p in problems[:_MAX_SHOWN])
        more = f"; and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        raise ArtifactError(
            f"{where}: {shown}{more}. Export the breaker again, or upgrade circuit-breakers if a "
            "newer version wrote it"
        ) from e


def _explain(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "manifest"
    if problem["type"] == "extra_forbidden":
        return f"got unknown field {field!r}, expected only the fields of schema_version 1"
    if problem["type"] == "missing":
        return f"field {field!r} is missing, expected a value"
    expected = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own validators say what they got
        return f"field {field!r}: {expected}"
    return f"field {field!r}: got {_shorten(repr(problem['input']))}, expected: {expected}"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
