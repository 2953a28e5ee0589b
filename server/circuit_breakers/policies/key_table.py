"""The lines of a policy file that stand for one API key."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import ValidationError

from circuit_breakers.errors import ConfigError
from circuit_breakers.policies.policy_file import RESERVED_IDS, KeySpec

__all__ = ["key_table"]


def key_table(
    key_id: str, key_hash: str, *, policy: str | None = None, scope: Sequence[str] | None = None
) -> str:
    """A `[[keys]]` table in TOML, without a newline at its end.

    Raises:
        ConfigError: a policy file with it would be refused.
    """
    values = {"id": key_id, "hash": key_hash, "policy": policy, "scope": scope}
    given = {name: value for name, value in values.items() if value}
    try:
        KeySpec.model_validate(given)
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        raise ConfigError(
            f"--{problem['loc'][0]}: got {problem['input']!r}, {problem['msg'].lower()}; see --help"
        ) from e
    if stands_for := RESERVED_IDS.get(key_id):
        raise ConfigError(f"--id: got {key_id!r}, which stands for {stands_for}; take another")
    # Strings and lists of these characters are the same in JSON and TOML.
    return "\n".join(["[[keys]]", *(f"{name} = {json.dumps(v)}" for name, v in given.items())])
