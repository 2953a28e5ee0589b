"""`keys new`: the key once, and lines that a policy file takes."""

from __future__ import annotations

import tomllib

import pytest
from typer.testing import CliRunner

from circuit_breakers.cli import app
from circuit_breakers.policies.api_keys import Pepper

SECRET = "a pepper of some length"


@pytest.fixture(autouse=True)
def pepper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIRCUIT_BREAKERS_PEPPER", SECRET)


def test_the_key_is_shown_once_and_its_hash_goes_into_the_file() -> None:
    arguments = ["--id", "team-a", "--policy", "strict", "--scope", "inference", "--scope", "admin"]
    done = CliRunner().invoke(app, ["keys", "new", *arguments])
    assert done.exit_code == 0
    (table,) = tomllib.loads(done.stdout)["keys"]
    shown = done.stderr.strip().rpartition(" ")[2]
    assert shown.startswith("cb-") and shown not in done.stdout
    assert table == {
        "id": "team-a",
        "hash": Pepper(SECRET.encode()).hash(shown),
        "policy": "strict",
        "scope": ["inference", "admin"],
    }


def test_every_key_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [CliRunner().invoke(app, ["keys", "new", "--id", "a"]) for _ in range(2)]
    assert runs[0].stdout != runs[1].stdout


def test_without_a_pepper_or_with_a_bad_name_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = CliRunner().invoke(app, ["keys", "new", "--id", "Team A"])
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert "--id: got 'Team A'" in bad.stderr and "cb-" not in bad.stderr
    monkeypatch.delenv("CIRCUIT_BREAKERS_PEPPER")
    none = CliRunner().invoke(app, ["keys", "new", "--id", "a"])
    assert (none.exit_code, none.stdout) == (2, "")
    assert "set CIRCUIT_BREAKERS_PEPPER" in none.stderr
