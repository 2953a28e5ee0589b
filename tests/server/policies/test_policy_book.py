"""Who runs under which policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuit_breakers.errors import ConfigError
from circuit_breakers.guard.policy import Policy
from circuit_breakers.policies.policy_book import PolicyBook
from circuit_breakers.policies.policy_file import load_policy_file
from circuit_breakers.policies.served_policy import ServedPolicy

from .manifests import manifest
from .test_policy_file import KEYS, write

MANIFEST = manifest()
OWN = ServedPolicy(policy=Policy.from_manifest(MANIFEST, "enforce"))
POLICIES = 'default = "standard"\n[policies.standard]\n[policies.strict]\nthreshold = 1.0\n'


def test_a_key_runs_under_its_policy_or_the_default(tmp_path: Path) -> None:
    file = load_policy_file(write(tmp_path, POLICIES + KEYS))
    book = PolicyBook.from_file(file, OWN, MANIFEST)
    team, ops = file.content.keys
    names = [book.of_key(key).name for key in (team, ops, None)]
    assert names == ["strict", "standard", "standard"]


def test_without_a_file_there_is_the_servers_own() -> None:
    book = PolicyBook.without_file(OWN, MANIFEST)
    assert book.of_key(None) is OWN
    assert list(book.policies) == ["default"]


def test_a_policy_that_does_not_fit_names_file_and_table(tmp_path: Path) -> None:
    file = load_policy_file(write(tmp_path, POLICIES + '[policies.odd]\nprobes = ["p9"]\n'))
    with pytest.raises(ConfigError, match=r"policies\.toml: \[policies\.odd\]: got probe 'p9'"):
        PolicyBook.from_file(file, OWN, MANIFEST)
