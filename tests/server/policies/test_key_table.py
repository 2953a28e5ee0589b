"""What `keys new` prints is what a policy file takes."""

from __future__ import annotations

import tomllib

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers.policies.key_table import key_table
from circuit_breakers.policies.policy_file import KeySpec

from .test_policy_file import HASHES


def test_the_lines_are_a_key_of_a_policy_file() -> None:
    text = key_table("team-a", HASHES[0], policy="strict", scope=["inference", "admin"])
    (key,) = tomllib.loads(text)["keys"]
    assert KeySpec.model_validate(key) == KeySpec(
        id="team-a", hash=HASHES[0], policy="strict", scope=frozenset({"inference", "admin"})
    )
    assert text.splitlines()[0] == "[[keys]]"
    assert "policy" not in key_table("team-a", HASHES[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"key_id": 'a"\nscope = ["admin"]'}, "--id: got"),
        ({"key_id": "anonymous"}, "--id: got 'anonymous', which stands for callers without a key"),
        ({"key_id": "console"}, "--id: got 'console', which stands for the key of serve --console"),
        ({"policy": "Strict"}, "--policy: got 'Strict'"),
        ({"scope": ["root"]}, "--scope: got"),
    ],
)
def test_what_a_file_would_refuse_is_not_printed(values: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"key_id": "a", "key_hash": HASHES[0]}
    with pytest.raises(ConfigError, match=message):
        key_table(**(given | values))  # type: ignore[arg-type]
